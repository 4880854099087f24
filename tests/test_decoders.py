"""DALI as the decoder: PyAV's frames to the bit on a CPU, or one line that says why not; never another picture."""

import logging
import os
import signal
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from draws import FILES, ONLY, draw, numbers, replay
from test_video import (
    HOSTILE,
    ISOLATED,
    LIMITED,
    PLAYLISTS,
    TRUE_FRAMES,
    OpenWatch,
    assert_no_children,
    open_descriptors,
)
from video_files import barcode_video, cover_only, cut, encode, mutated, patch, read_barcode, set_matrix

from sdr import decode_worker, video
from sdr.decoding import Limits, why_no_dali
from sdr.detectors import Faces
from sdr.errors import SDRError
from sdr.score import ScoreConfig, Scorer
from sdr.video import open_video

needs_dali = pytest.mark.skipif(why_no_dali(needs_gpu=False) != "", reason="DALI is not installed")
without_gpu = pytest.mark.skipif(why_no_dali(needs_gpu=True) == "", reason="on a GPU DALI decodes other files too")
FUZZ = pytest.mark.promise(row="fuzz")
ABSENT = pytest.mark.promise(row="absent parts")

FUZZED = min(FILES, 15 + FILES // 100)  # mutated files; starting DALI takes part of a second
OF_THE_MACHINE = ("needs a GPU", "of memory", "not installed", "cannot be imported")  # another one may take the file
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}


def read(path, decoder, **limits):
    """(seconds, pictures, the closed Video) of one pass."""
    with open_video(path, limits=Limits(**limits), decoder=decoder) as opened:
        seconds, pictures = zip(*opened.frames(), strict=True)
    return seconds, pictures, opened


def error_of(path, **limits) -> str:
    with pytest.raises(SDRError) as caught:
        read(path, "dali", **limits)
    line = str(caught.value)
    assert line.isprintable()
    assert "decoder process" not in line  # it neither died nor failed
    assert caught.value.again == any(fault in line for fault in OF_THE_MACHINE)
    assert_no_children()
    return line


def assert_same_frames(path, **limits):
    """DALI gives PyAV's frames and times, bit for bit: on a CPU both are FFmpeg. Returns the bar codes."""
    (seconds, truth, by_pyav), (times, pictures, by_dali) = (read(path, d, **limits) for d in ("pyav", "dali"))
    assert (by_pyav.decoder, by_dali.decoder) == ("pyav", "dali")
    assert times == seconds
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(pictures, truth, strict=True))
    assert by_dali.info == by_pyav.info
    assert (by_dali.damage, by_dali.frames_read) == ("", len(truth))
    return [read_barcode(picture) for picture in pictures]


KINDS = {
    "vp9.webm": VP9,
    "vp9.mp4": VP9,
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mjpeg.avi": MJPEG,
    "mjpeg.mov": MJPEG,
    "odd.webm": VP9 | {"size": (63, 47)},
    "one.webm": VP9 | {"frames": 1},
    "variable.mkv": MJPEG | {"frames": 5, "pts": [0, 0.04, 0.2, 0.21, 1.5]},
    "tagged-hd.webm": VP9 | {"size": (1280, 64), "context": {"colorspace": 6}},
}


@TRUE_FRAMES
@needs_dali
@without_gpu
@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_pyav(tmp_path, name):
    settings = {"frames": 20} | KINDS[name]
    assert assert_same_frames(barcode_video(tmp_path / name, **settings)) == list(range(settings["frames"]))


@TRUE_FRAMES
@needs_dali
@without_gpu
@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1)])
def test_pictures_are_turned(tmp_path, matrix):
    assert_same_frames(set_matrix(barcode_video(tmp_path / "a.mov", 2, **MJPEG), *matrix))


@TRUE_FRAMES
@needs_dali
@without_gpu
def test_colourful_pictures_are_those_of_pyav(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    assert_same_frames(encode(tmp_path / "a.webm", [picture] * 3, **VP9))
    assert_same_frames(encode(tmp_path / "a.mkv", [picture] * 3, **MJPEG))


@TRUE_FRAMES
@needs_dali
@without_gpu
@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_limited_range_is_rounded_to_the_nearest_step(tmp_path, decoder):
    ramp = np.arange(256, dtype=np.uint8).repeat(2)[None].repeat(16, 0)
    path = encode(tmp_path / "a.webm", [ramp], codec="libvpx-vp9", options={"lossless": "1"})
    import av

    with av.open(str(path)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:16]
    truth = np.clip((luma.astype(np.float64) - 16) * 255 / 219, 0, 255)
    assert np.abs(read(path, decoder)[1][0] - truth[..., None]).max() < 0.51  # half a step, and the tables' last bit


@TRUE_FRAMES
@needs_dali
@without_gpu
def test_long_videos_come_in_windows(tmp_path):
    """A window is a quarter of the memory: 34 frames of the 75."""
    path = barcode_video(tmp_path / "a.mkv", 75, (1280, 720), **MJPEG)
    assert assert_same_frames(path, memory=3 * 2**27) == list(range(75))


# --- refused ----------------------------------------------------------------------------------------------------------


def moved_times(path):
    return barcode_video(path, 5, **MJPEG, pts=np.arange(5) * 0.04, packet_pts=[0, 340, 80, 420, 160])


def half_a_packet(path):
    """A VP8 packet with a few zeros in it: FFmpeg's decoder gives it up without a word."""
    import av

    data = bytearray(barcode_video(path, 10, codec="libvpx").read_bytes())
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][7]
    at = data.index(packet)
    data[at + 5 : at + 10] = bytes(5)
    path.write_bytes(data)
    return path


def noisy(path, at: float = 0.5, **settings):
    """Noise in one picture of many; the container stays whole."""
    data = bytearray(barcode_video(path, 60, (320, 240), **settings).read_bytes())
    start = int(at * len(data))
    data[start : start + 60] = np.random.default_rng(0).bytes(60)
    path.write_bytes(data)
    return path


REFUSED = {
    "h264 needs a GPU": lambda p: barcode_video(p / "a.mp4", 3),
    "ffv1 needs another decoder": lambda p: barcode_video(p / "a.mkv", 3, codec="ffv1"),
    "colour matrix BT.709": lambda p: barcode_video(p / "a.webm", 3, **VP9, context={"colorspace": 1}),
    "matrix BT.709, it knows BT.601 alone": lambda p: barcode_video(p / "a.webm", 2, (1280, 64), **VP9),
    "full colour range": lambda p: barcode_video(p / "a.webm", 3, **VP9, context={"color_range": 2}),
    "pixels of kind yuvj444p": lambda p: barcode_video(p / "a.mov", 3, codec="mjpeg", pix_fmt="yuvj444p"),
    "not square": lambda p: barcode_video(p / "a.mkv", 3, **MJPEG, context={"sample_aspect_ratio": Fraction(2, 1)}),
    "timestamps are repeated": lambda p: moved_times(p / "a.mkv"),
    "bytes too early": lambda p: cut(barcode_video(p / "a.avi", 20, **MJPEG), 0.5),
    "bytes too early (": lambda p: cut(barcode_video(p / "a.webm", 20, **VP9), 0.6),
    "its decoder reported an error": lambda p: noisy(p / "a.avi", **MJPEG),
    "damaged: packets that could not be decoded: 1": lambda p: half_a_packet(p / "a.webm"),
    "Invalid data found": lambda p: noisy(p / "a.mp4", **VP9),
    "it finds 13 frames": lambda p: patch(barcode_video(p / "a.mov", 24, **MJPEG), b"elst", 8, ">ii", 480, 8 * 512),
}


@TRUE_FRAMES
@needs_dali
@without_gpu
@pytest.mark.parametrize("reason", REFUSED)
def test_what_dali_would_show_differently_is_refused(tmp_path, monkeypatch, caplog, reason):
    path = REFUSED[reason](tmp_path)
    line = error_of(path)
    assert "not decoded by DALI: " in line
    assert reason in line
    assert "--decoder pyav" in line
    if reason == "colour matrix BT.709":  # auto takes PyAV for it, and says so
        monkeypatch.setattr(video, "why_no_dali", lambda needs_gpu: "")
        assert read(path, "auto")[2].decoder == "pyav"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "is decoded by PyAV: not decoded by DALI: colour matrix BT.709" in caplog.text


@HOSTILE
@needs_dali
@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF" + bytes(100), *map(str.encode, PLAYLISTS.values())])
def test_what_is_no_video_is_refused_as_ever(tmp_path, content):
    second = barcode_video(tmp_path / "second.webm", 2, **VP9)
    path = tmp_path / "a.mp4"
    path.write_bytes(content.replace(b"{}", os.fsencode(second)))
    with pytest.raises(SDRError) as by_pyav:
        open_video(path)
    with OpenWatch(second) as watch:
        assert error_of(path) == str(by_pyav.value)
        assert not watch.opened()


@HOSTILE
@needs_dali
@pytest.mark.parametrize("kind", ["concat", "hls"])
def test_dali_gets_no_bytes_that_open_another_file(tmp_path, monkeypatch, kind):
    """With the check of the first bytes out of the way, the demuxer that FFmpeg would take is not the one vetted."""
    second = barcode_video(tmp_path / "second.webm", 2, **VP9)
    path = tmp_path / "a.mp4"
    path.write_text(PLAYLISTS[kind].format(second))
    monkeypatch.setattr(video, "demuxer_of", lambda path, fd: "matroska")
    with OpenWatch(second) as watch:
        error_of(path)
        assert not watch.opened()


@TRUE_FRAMES
@needs_dali
def test_bytes_must_be_what_was_vetted_to_dali_too(tmp_path, monkeypatch):
    path = barcode_video(tmp_path / "a.webm", 2, **VP9)
    monkeypatch.setattr(video, "demuxer_of", lambda path, fd: "mpeg")
    assert "it could also be read as matroska,webm" in error_of(path)


@HOSTILE
@needs_dali
def test_sound_with_a_cover_is_refused_as_ever(tmp_path):
    assert "no video stream, only audio, cover art" in error_of(cover_only(tmp_path / "a.mp4"))


@LIMITED
@needs_dali
@without_gpu
def test_limits_hold(tmp_path):
    path = barcode_video(tmp_path / "a.webm", 20, (320, 240), **VP9)
    assert "frames are over the limit of 19" in error_of(path, max_frames=19)
    assert "320x240 pixels are over the limit" in error_of(path, max_pixels=320 * 240 - 1)
    for mebibytes in (60, 130):  # too little to import it, and to start its threads
        assert f"needs more than {mebibytes} MiB of memory" in error_of(path, memory=mebibytes * 2**20)
    with pytest.raises(SDRError, match=r"not decoded within 0\.01 s"):
        read(path, "dali", seconds=0.01)
    large = path.with_name("large.mkv")
    large.write_bytes(path.read_bytes() + bytes(65 * 2**20))
    assert "a file of" in error_of(large, memory=2**28)
    assert_no_children()


@TRUE_FRAMES
@FUZZ
@needs_dali
@without_gpu
def test_damage_that_pyav_reports_is_never_concealed(tmp_path, record_property):
    kinds = {"vp9.webm": VP9, "vp9.mp4": VP9, "vp8.webm": {"codec": "libvpx"}, "mjpeg.mov": MJPEG, "mjpeg.avi": MJPEG}
    originals = [(name, barcode_video(tmp_path / name, 10, **kind).read_bytes()) for name, kind in kinds.items()]
    accepted = refused = died = 0
    for number in numbers(FUZZED):
        name, data = originals[number % len(originals)]
        path = tmp_path / f"mutated-{name}"
        path.write_bytes(mutated(data, name, originals[number % len(originals) - 1][1], draw("dali", number)))
        again = replay("tests/test_decoders.py -k concealed", number)
        try:
            _, pictures, opened = read(path, "dali", seconds=30)
        except SDRError as error:
            refused += 1
            died += "decoder process" in str(error)
            continue
        _, truth, by_pyav = read(path, "pyav", seconds=30)
        assert len(pictures) == len(truth) or opened.damage, again
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(pictures, truth, strict=False)), again
        assert opened.damage or not by_pyav.damage, again
        accepted += 1
    assert died == 0
    assert accepted or ONLY is not None
    record_property("mutated videos that DALI took", accepted)
    record_property("mutated videos that DALI refused", refused)
    assert_no_children()


# --- which decoder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    video._say_once.cache_clear()
    yield
    video._say_once.cache_clear()


@ABSENT
def test_without_dali(tmp_path, no_dali, caplog):
    path = barcode_video(tmp_path / "a.mp4", 3)
    assert "not decoded by DALI: it is not installed: pip install" in error_of(path)
    for _ in range(2):
        assert read(path, "auto")[2].decoder == "pyav"
    assert [record.getMessage()[:70] for record in caplog.records] == [
        "videos are decoded by PyAV, not by DALI: it is not installed: pip inst"
    ]


@ABSENT
@without_gpu
def test_auto_without_a_gpu_is_pyav_and_says_so(tmp_path, caplog):
    video._say_once.cache_clear()
    path = barcode_video(tmp_path / "a.webm", 3, **VP9)
    assert read(path, "auto")[2].decoder == "pyav"
    assert len(caplog.records) == 1
    assert why_no_dali(needs_gpu=True) in caplog.text


@needs_dali
@without_gpu
def test_auto_takes_dali_where_it_can(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video, "why_no_dali", lambda needs_gpu: "")
    caplog.set_level(logging.INFO, "sdr.video")
    assert read(barcode_video(tmp_path / "a.webm", 3, **VP9), "auto")[2].decoder == "dali"
    assert "is decoded by DALI" in caplog.text


@HOSTILE
@needs_dali
def test_broken_dali_is_one_line(tmp_path, monkeypatch):
    package = tmp_path / "nvidia" / "dali"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('libcuda.so.1 is too old')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = barcode_video(tmp_path / "a.webm", 3, **VP9)
    assert "DALI cannot be imported: libcuda.so.1 is too old" in error_of(path)


def test_rejects_an_unknown_decoder(tmp_path):
    with pytest.raises(ValueError, match="decoder must be one of pyav, dali, auto, got 'opencv'"):
        open_video(tmp_path / "a.mp4", decoder="opencv")
    with pytest.raises(ValueError, match="decoder must be"):
        ScoreConfig(decoder="opencv")


@needs_dali
@without_gpu
def test_scores_say_which_decoder_ran(tmp_path):
    path = barcode_video(tmp_path / "a.webm", 3, **VP9)
    shape = SimpleNamespace(num_frames=8, image_size=32)
    no_face = Faces(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, np.float32))
    for decoder in ("pyav", "dali"):
        scorer = Scorer.__new__(Scorer)
        scorer.model, scorer.detector, scorer.cache = SimpleNamespace(config=shape), lambda frame: no_face, None
        scorer.config = ScoreConfig(decoder=decoder)
        result = scorer(path)
        assert (result.decoder, result.state) == (decoder, "inconclusive")
    (tmp_path / "text.mp4").write_text("text")
    assert scorer(tmp_path / "text.mp4").decoder == ""


# --- the decoding process ---------------------------------------------------------------------------------------------


@ISOLATED
@needs_dali
@without_gpu
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_is_one_failed_file(tmp_path, number):
    path = barcode_video(tmp_path / "a.mkv", 40, (640, 480), **MJPEG)
    with open_video(path, decoder="dali") as opened:
        frames = opened.frames()
        next(frames)
        os.kill(opened._workers[0]._process.pid, number)
        with pytest.raises(SDRError, match=rf"decoder process died \(signal {int(number)}\)$"):
            list(frames)
        assert read_barcode(next(opened.frames())[1]) == 0
    assert_no_children()


@HOSTILE
@needs_dali
@without_gpu
def test_nothing_is_left_behind(tmp_path):
    path = barcode_video(tmp_path / "a.mkv", 40, (320, 240), **MJPEG)
    before = open_descriptors()
    for _ in range(3):
        with open_video(path, decoder="dali") as opened:
            next(opened.frames())
        assert_no_children()
    assert open_descriptors() == before


@ISOLATED
@needs_dali
@without_gpu
def test_worker_may_open_nothing(tmp_path):
    with open_video(barcode_video(tmp_path / "a.mkv", 40, (640, 480), **MJPEG), decoder="dali") as opened:
        limits = Path(f"/proc/{opened._ready._process.pid}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert rows["Max open files"] == ["0", "0"]
    assert rows["Max data size"] == [str(2**30)] * 2


@ISOLATED
@needs_dali
@without_gpu
def test_a_lower_limit_of_the_user_stays(tmp_path, monkeypatch):
    script, most = tmp_path / "decode_worker.py", 2**30 - 2**20
    lower = f"import resource, runpy\nresource.setrlimit(resource.RLIMIT_DATA, ({most}, {most}))\n"
    script.write_text(f"{lower}runpy.run_path({decode_worker.__file__!r}, run_name='__main__')\n", "utf-8")
    monkeypatch.setattr(decode_worker, "__file__", str(script))
    with open_video(barcode_video(tmp_path / "a.mkv", 40, (640, 480), **MJPEG), decoder="dali") as opened:
        limits = Path(f"/proc/{opened._ready._process.pid}/limits").read_text()
    row = next(line for line in limits.splitlines() if line.startswith("Max data size"))
    assert row.split()[3:5] == [str(most)] * 2


# --- a decoder that lies ----------------------------------------------------------------------------------------------


class FakeDali:
    """Hands out given frames; ``spoil`` changes a request's."""

    def __init__(self, pictures, spoil=lambda start, frames: frames) -> None:
        self.pictures, self.spoil, self.failure = pictures, spoil, ""

    def frames(self, start, stop):
        frames = self.spoil(start, self.pictures[start:stop].copy())
        self.failure = "it failed" if frames is None else ""
        return frames


def reading_of(path, spoil, window: int, *, every: bool = False):
    """(a Reading over a fake DALI that gives PyAV's own frames, the first frame, bytes of a window).

    ``every``: each picture is compared with PyAV's, as without a GPU.
    """
    from sdr import decode_worker_dali as worker

    job = {"demuxer": "matroska", "max_pixels": 10**6, "max_frames": 100}
    pictures = np.stack(read(path, "pyav")[1])
    container, stream, info, first = worker._first_frame(path.read_bytes(), job, False)
    times, spots = worker._packets(path.read_bytes(), job, info)
    picture = worker.Picture(container, stream, job, info["fps"])
    truth = worker._second_decoder(path.read_bytes(), job) if every else None
    reading = worker.Reading(FakeDali(pictures, spoil), stream, picture, times, spots, truth)
    return reading, first, window * pictures[0].nbytes


def brighter(start, frames):
    return np.clip(frames.astype(int) + 12, 0, 255).astype(np.uint8)


LIES = {  # what a request gives, what is said of it, frames that are believed before
    "honest": (lambda start, frames: frames, "", 20),
    "one more": (lambda start, frames: frames[[*range(len(frames)), -1]], "refused: it finds more than 20 frames", 0),
    "colours": (brighter, "refused: its colours differ by 12", 0),
    "size": (lambda start, frames: frames[:, :, :32], "refused: 32x48 pixels where there are 64x48", 0),
    "fails": (lambda start, frames: None, "refused: it failed", 0),
    "fails later": (lambda start, frames: None if start == 15 else frames, "DALI: it failed", 16),
    "ends": (lambda start, frames: frames[: 4 if start == 7 else 99], "DALI: it finds 11 frames or more, there are", 8),
    "another": (lambda start, frames: frames[::-1] if start == 7 else frames, "DALI: frame 7 is another picture", 8),
    "colours later": (
        lambda start, frames: np.concatenate([frames[:1], brighter(start, frames[1:])]) if start == 7 else frames,
        "DALI: its colours differ by 12",
        8,
    ),
}


@TRUE_FRAMES
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(tmp_path, lie):
    from sdr import decode_worker_dali as worker

    spoil, said, believed = LIES[lie]
    path = barcode_video(tmp_path / "a.webm", 20, **VP9 | {"options": VP9["options"] | {"g": "5"}})
    reading, first, memory = reading_of(path, spoil, window=8)
    frames = []
    try:
        reading.start(first, memory)
        frames = [(seconds, read_barcode(pixels)) for seconds, pixels in reading.frames()]
        line = reading.stopped
    except worker.RefusedError as refusal:
        line = str(refusal).replace("not decoded by DALI", "refused")
    assert line.startswith(said)
    assert bool(line) == bool(said)
    assert [number for _, number in frames] == list(range(believed))
    assert reading.read == believed


@TRUE_FRAMES
@pytest.mark.parametrize("place", [3, 12])
def test_without_a_gpu_one_wrong_pixel_is_found(tmp_path, place):
    from sdr import decode_worker_dali as worker

    def spoil(start, frames):
        if start <= place < start + len(frames):
            frames[place - start, 5, 5, 1] ^= 1
        return frames

    path = barcode_video(tmp_path / "a.webm", 20, **VP9)
    reading, first, memory = reading_of(path, spoil, window=8, every=True)
    said = f"frame {place} is another picture than PyAV's"
    if place < 8:
        with pytest.raises(worker.RefusedError, match=said):
            reading.start(first, memory)
    else:
        reading.start(first, memory)
        assert len(list(reading.frames())) == 8
        assert reading.stopped == f"DALI: {said}"


@TRUE_FRAMES
def test_without_a_gpu_pictures_that_pyav_lacks_are_said(tmp_path):
    path = barcode_video(tmp_path / "a.webm", 20, **VP9)
    reading, first, memory = reading_of(path, LIES["honest"][0], window=8, every=True)
    reading._true_frames = islice(reading._true_frames, 12)
    reading.start(first, memory)
    assert len(list(reading.frames())) == 8
    assert reading.stopped == "DALI: damaged: PyAV decodes 12 frames"
