"""sdr.video: true frames from every kind of file, one line of error from every other, and nothing left behind."""

import ctypes
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from video_files import (
    barcode,
    barcode_video,
    cover_only,
    cut,
    drop_box,
    encode,
    only_subtitles,
    patch,
    point_elsewhere,
    read_barcode,
    set_matrix,
    sound_only,
)

from sdr import decode_worker, video
from sdr.decoding import KEPT, SET
from sdr.errors import SDRError
from sdr.video import Limits, open_video, sample_clips

HOSTILE = pytest.mark.promise(row="hostile files")
TRUE_FRAMES = pytest.mark.promise(row="true frames")
ISOLATED = pytest.mark.promise(row="isolation")
LIMITED = pytest.mark.promise(row="limits")

QUIET_265 = {"x265-params": "log-level=none"}
FRAGMENTED = {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "4"}}


def decode(path, **limits):
    """(numbers in the pictures, their seconds, the closed Video) of one pass."""
    with open_video(path, limits=Limits(**limits)) as opened:
        frames = [(read_barcode(picture), seconds) for seconds, picture in opened.frames()]
    numbers, seconds = map(list, zip(*frames, strict=True))
    return numbers, seconds, opened


def error_of(path, *, again: bool = False, **limits) -> str:
    """The one line that a file is refused with; ``again``: the fault is the machine's."""
    with pytest.raises(SDRError) as caught, open_video(path, limits=Limits(**limits)) as opened:
        for _ in opened.frames():
            pass
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(video.escape(path))
    assert caught.value.again == again
    return line


def outcome(path, **limits) -> tuple[list[int], str]:
    """(numbers, damage) of a file that decodes, ([], the error's line) of one that does not; a checked line in both."""
    try:
        numbers, _, opened = decode(path, **limits)
        line = opened.damage
    except SDRError as error:
        numbers, line = [], str(error)
    assert line.isprintable()
    assert "decoder process" not in line  # it neither died nor failed
    return numbers, line


# --- true frames ------------------------------------------------------------------------------------------------------

KINDS = {
    "h264.mp4": {},
    "h265.mp4": {"codec": "libx265", "options": QUIET_265},
    "av1.mp4": {"codec": "libsvtav1"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9-alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": {"auto-alt-ref": "0"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "h264.ts": {},
    "h264.m2ts": {"muxer": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "mpeg2.vob": {"codec": "mpeg2video", "muxer": "vob"},
    "10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "12bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p12le", "options": QUIET_265},
    "yuv444.mp4": {"pix_fmt": "yuv444p"},
    "gray.mp4": {"pix_fmt": "gray"},
    "gray16.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "rgb.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "raw-rgb.mov": {"codec": "rawvideo", "pix_fmt": "rgb24"},
    "bottom-up.avi": {"codec": "rawvideo", "pix_fmt": "bgr24"},
    "interlaced.ts": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}},
    "fragmented.mp4": FRAGMENTED,
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "odd.mkv": {"size": (63, 47), "codec": "ffv1"},
    "odd.mp4": {"size": (35, 31), "pix_fmt": "yuv444p"},
    "8x2000.mp4": {"size": (8, 2000)},
    "one.mp4": {"frames": 1},
    "two.mp4": {"frames": 2},
    "1000fps.mp4": {"rate": 1000},
}


@TRUE_FRAMES
@pytest.mark.parametrize("name", KINDS)
def test_every_frame_comes_back_once_in_order(tmp_path, name):
    settings = {"frames": 10, **KINDS[name]}
    numbers, seconds, opened = decode(barcode_video(tmp_path / name, **settings))
    assert numbers == list(range(settings["frames"]))
    assert seconds == pytest.approx(np.arange(settings["frames"]) / settings.get("rate", 25), abs=2e-3)
    assert (opened.info.width, opened.info.height) == settings.get("size", (64, 48))
    assert opened.info.fps == pytest.approx(settings.get("rate", 25))
    assert opened.info.frames_declared in (0, settings["frames"])
    assert (opened.frames_read, opened.damage) == (settings["frames"], "")


@TRUE_FRAMES
@pytest.mark.parametrize("name", ["h264.mp4", "h265.mp4", "vp9-alpha.webm", "h264.ts", "mpeg1.mpg"])
def test_second_pass_equals_the_first_and_passes_may_overlap(tmp_path, name):
    path = barcode_video(tmp_path / name, 20, **KINDS[name])
    with open_video(path) as opened:
        abandoned = opened.frames()
        assert [read_barcode(next(abandoned)[1]) for _ in range(7)] == list(range(7))
        passes = [opened.frames(), opened.frames(), opened.frames()]
        for number in range(20):
            pictures = [next(frames)[1] for frames in passes]
            assert [read_barcode(picture) for picture in pictures] == [number] * 3
            assert all(np.array_equal(pictures[0], picture) for picture in pictures[1:])
        assert all(next(frames, None) is None for frames in passes)
        assert opened.frames_read == 20


@TRUE_FRAMES
def test_info_and_hash(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 30, codec="libsvtav1", rate=Fraction(30000, 1001))
    with open_video(path) as opened:
        info = opened.info
        assert (info.frames_declared, info.container, info.codec) == (30, "mov", "av1")
        assert (info.fps, info.duration) == pytest.approx((30000 / 1001, 1.001), rel=1e-4)
        assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@TRUE_FRAMES
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (6, 3)])
def test_smallest_pictures(tmp_path, size):
    pictures = [np.full((size[1], size[0]), level, np.uint8) for level in (0, 128, 255)]
    with open_video(encode(tmp_path / "a.mkv", pictures, codec="ffv1", pix_fmt="gray")) as opened:
        for (_, picture), expected in zip(opened.frames(), pictures, strict=True):
            assert np.array_equal(picture, np.repeat(expected[..., None], 3, 2))


# x' = a x + c y, y' = b x + d y of the display matrix, as an operation on [H, W] rows and columns
TURNED = {
    "none": ((1, 0, 0, 1), lambda p: p),
    "90 clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270 clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down mirrored": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), np.transpose),
    "anti-transposed": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).T),
}


@TRUE_FRAMES
@pytest.mark.parametrize("name", TURNED)
def test_display_matrix_is_applied(tmp_path, name):
    matrix, turn = TURNED[name]
    path = set_matrix(barcode_video(tmp_path / "a.mov", 2, codec="qtrle", pix_fmt="rgb24"), *matrix)
    with open_video(path) as opened:
        for number, (_, picture) in enumerate(opened.frames()):
            assert np.array_equal(picture[..., 0], turn(barcode(number)))
        assert (opened.info.height, opened.info.width) == picture.shape[:2]


@TRUE_FRAMES
@pytest.mark.parametrize(("aspect", "size"), [((2, 1), (128, 48)), ((1, 4), (16, 48)), ((64, 45), (91, 48))])
def test_pixels_become_square(tmp_path, aspect, size):
    path = barcode_video(tmp_path / "a.mp4", 3, context={"sample_aspect_ratio": Fraction(*aspect)})
    numbers, _, opened = decode(path)
    assert numbers == [0, 1, 2]
    assert (opened.info.width, opened.info.height) == size


@LIMITED
def test_absurd_pixel_aspect_is_over_the_limit(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 2, context={"sample_aspect_ratio": Fraction(2, 1)})
    assert "pixels are over the limit" in error_of(patch(path, b"pasp", 0, ">II", 65535, 1))


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # red and blue weights of luma
NAMED = {"709": (1, BT709), "601": (6, BT601), "470bg": (5, BT601), "2020": (9, BT2020), "none": (2, BT601)}


def yuv_frame(rgb, weights, size, *, full: bool, colorspace: int):
    """A plain yuv444p av.VideoFrame of one colour, by the definition of Y'CbCr."""
    import av

    red, green, blue = np.array(rgb, np.float64) / 255
    luma = weights[0] * red + (1 - sum(weights)) * green + weights[1] * blue
    chroma = (blue - luma) / (2 - 2 * weights[1]), (red - luma) / (2 - 2 * weights[0])
    scale = (255, 255, 0) if full else (219, 224, 16)
    values = [scale[2] + scale[0] * luma, *(128 + scale[1] * c for c in chroma)]
    planes = np.broadcast_to(np.rint(values).astype(np.uint8)[:, None, None], (3, size[1], size[0]))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
    frame.colorspace, frame.color_range = colorspace, 2 if full else 1
    return frame


def assert_colour(path, frame, rgb, *, full=False, colorspace):
    context = {"colorspace": colorspace, "color_range": 2 if full else 1}
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv444p"
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_video(path) as opened:
        picture = next(iter(opened.frames()))[1]
    assert np.abs(picture.astype(int) - rgb).max() <= 2  # 8-bit Y'CbCr holds a colour to about one step of RGB


@TRUE_FRAMES
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("name", NAMED)
def test_colour_matrix_and_range_are_honoured(tmp_path, name, full):
    colorspace, weights = NAMED[name]
    rgb = (200, 60, 30)
    frame = yuv_frame(rgb, weights, (64, 48), full=full, colorspace=colorspace)
    assert_colour(tmp_path / "a.mp4", frame, rgb, full=full, colorspace=colorspace)


@TRUE_FRAMES
def test_unnamed_colour_matrix_of_hd_is_bt709(tmp_path):
    rgb = (30, 200, 60)
    frame = yuv_frame(rgb, BT709, (1280, 64), full=False, colorspace=2)
    assert_colour(tmp_path / "a.mp4", frame, rgb, colorspace=2)


# --- time -------------------------------------------------------------------------------------------------------------

TIMES = {
    "variable": [0, 0.04, 0.2, 0.21, 1.5],
    "24-hour gap": [0, 0.04, 0.08, 86400, 86400.04],
}


@TRUE_FRAMES
@pytest.mark.parametrize("name", TIMES)
def test_seconds_are_the_timestamps(tmp_path, name):
    path = barcode_video(tmp_path / "a.mp4", 5, pts=TIMES[name], options={"bf": "0"})
    numbers, seconds, opened = decode(path)
    assert (numbers, opened.damage) == ([0, 1, 2, 3, 4], "")
    assert seconds == pytest.approx(TIMES[name], abs=1e-3)


@TRUE_FRAMES
def test_variable_rate_avi_is_not_damaged(tmp_path):
    """AVI fills the gaps with empty chunks, which its header counts as frames."""
    path = barcode_video(tmp_path / "a.avi", 8, codec="mpeg4", pts=[0, 0.04, 0.4, 0.44, 0.48, 1.0, 1.04, 1.08])
    with open_video(path) as opened:
        assert [read_barcode(picture) for _, picture in opened.frames()] == list(range(8))
        assert opened.damage == ""
        assert opened.info.frames_declared == 8
    cut(path, 0.7)
    with open_video(path) as opened:
        list(opened.frames())
        assert opened.damage


@HOSTILE
@ISOLATED
@pytest.mark.parametrize(
    "payload", [b"[]", b"nonsense", b'{"width": "x"}', b"[" * 50_000], ids=["list", "text", "field", "deep"]
)
def test_worker_that_sends_nonsense_is_one_line(tmp_path, monkeypatch, payload):
    path = barcode_video(tmp_path / "a.mp4", 2)
    script = tmp_path / "worker.py"
    confined = b'{"unfiltered": ""}'
    records = [struct.pack("<cQ", kind, len(data)) + data for kind, data in ((b"C", confined), (b"H", payload))]
    script.write_text(f"import os\nos.write(1, {b''.join(records)!r})\n")
    monkeypatch.setattr("sdr.decode_worker.__file__", str(script))
    with pytest.raises(SDRError, match="decoder process sent an impossible record") as caught:
        open_video(path)
    assert not caught.value.again
    assert_no_children()


@TRUE_FRAMES
def test_timestamps_that_run_backwards_stand_still(tmp_path):
    mjpeg = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "pts": np.arange(5) * 0.04}
    path = barcode_video(tmp_path / "a.mkv", 5, **mjpeg, packet_pts=[0, 340, 80, 420, 160])
    numbers, seconds, _ = decode(path)
    assert numbers == [0, 1, 2, 3, 4]
    assert seconds == pytest.approx([0, 0.34, 0.34, 0.42, 0.42])


@TRUE_FRAMES
def test_negative_timestamps_start_at_zero(tmp_path):
    options = {"avoid_negative_ts": "disabled", "use_editlist": "0"}
    path = barcode_video(tmp_path / "a.ts", 5, pts=np.arange(-5, 0) * 0.04, container_options=options)
    numbers, seconds, _ = decode(path)
    assert numbers == [0, 1, 2, 3, 4]
    assert seconds == pytest.approx(np.arange(5) * 0.04, abs=1e-3)


@TRUE_FRAMES
@pytest.mark.parametrize("rate", [(1, 0), (0, 0), (0, 25)])
def test_zero_frame_rate(tmp_path, rate):
    path = patch(barcode_video(tmp_path / "a.avi", 5, codec="mpeg4"), b"strh", 20, "<II", *rate)
    numbers, seconds, opened = decode(path)
    assert numbers == [0, 1, 2, 3, 4]
    assert np.isfinite(seconds).all()
    assert np.isfinite(opened.info.fps)


@HOSTILE
def test_zero_time_scale_is_an_error_or_frames(tmp_path):
    path = patch(barcode_video(tmp_path / "a.mp4", 5), b"mdhd", 12, ">I", 0)
    assert "no frame could be decoded" in error_of(path)


@TRUE_FRAMES
def test_edit_list_hides_frames_and_is_no_damage(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 24, options={"g": "6", "bf": "0"})
    patch(path, b"elst", 8, ">ii", 480, 8 * 512)  # 12 frames from the 9th on; 1000 and 12800 ticks a second
    numbers, seconds, opened = decode(path)
    assert numbers == list(range(8, 20))
    assert seconds == pytest.approx(np.arange(12) * 0.04)
    assert (opened.info.frames_declared, opened.frames_read, opened.damage) == (12, 12, "")


# --- damage -----------------------------------------------------------------------------------------------------------

WITH_LENGTH = {
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "end.mp4": {},
    "fragmented.mp4": FRAGMENTED,
    "a.mkv": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "a.ts": {},
}


@TRUE_FRAMES
@HOSTILE
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", WITH_LENGTH)
def test_truncated_file_is_damaged_or_an_error(tmp_path, name, fraction):
    path = cut(barcode_video(tmp_path / name, 60, **WITH_LENGTH[name]), fraction)
    numbers, line = outcome(path)
    assert line
    intact = [number for number in numbers if number >= 0]
    assert intact == sorted(intact)


@TRUE_FRAMES
@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
def test_a_length_that_no_file_can_have(tmp_path, length):
    path = barcode_video(tmp_path / "a.mp4", 12, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data + struct.pack(">I4sQ", 1, b"free", length))
    _, line = outcome(path)
    assert f"the file ends {length - 16} bytes too early" in line


def test_missing_frames_are_counted(tmp_path):
    path = cut(barcode_video(tmp_path / "a.mp4", 120, container_options={"movflags": "faststart"}), 0.7)
    numbers, _, opened = decode(path)
    assert len(numbers) == opened.frames_read < 120
    assert opened.damage.startswith(f"{opened.frames_read} of 120 declared frames could be read")


@TRUE_FRAMES
@pytest.mark.parametrize(
    ("name", "codec", "counted"),
    [
        ("a.mp4", "libx264", "packets that could not be decoded: "),
        ("a.avi", "mpeg4", "damaged frames: "),
        ("a.ts", "mpeg2video", "damaged frames: "),
    ],
)
def test_overwritten_frames_are_reported(tmp_path, name, codec, counted):
    """A stretch in the middle of the compressed pictures becomes noise; the container stays whole."""
    pictures = np.random.default_rng(0).integers(0, 256, (30, 48, 64), dtype=np.uint8)
    path = encode(tmp_path / name, pictures, codec=codec)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    path.write_bytes(data)
    damage = decode(path)[2].damage
    assert "errors the decoder reported" in damage
    assert counted in damage


@TRUE_FRAMES
def test_pass_that_was_abandoned_leaves_no_verdict(tmp_path):
    with open_video(barcode_video(tmp_path / "a.mp4", 8)) as opened:
        next(opened.frames())
        assert (opened.frames_read, opened.damage) == (0, "")


# --- refused files ----------------------------------------------------------------------------------------------------

NOT_VIDEO = {
    "text": (b"once upon a time\n" * 9, "text"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG image"),
    "GIF": (b"GIF89a" + bytes(99), "GIF image"),
    "ELF": (b"\x7fELF" + bytes(99), "ELF program"),
    "zeros": (bytes(999), "zero bytes"),
    "random": (np.random.default_rng(5).bytes(9999), "unknown data"),
    "subtitles": (b"1\n00:00:01,000 --> 00:00:02,000\nHello\n", "text"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt ", "RIFF file"),
}


@HOSTILE
@pytest.mark.parametrize("name", NOT_VIDEO)
def test_other_files_are_named_for_what_they_are(tmp_path, name):
    data, kind = NOT_VIDEO[name]
    (tmp_path / "a.mp4").write_bytes(data)
    line = error_of(tmp_path / "a.mp4")
    assert "not a video" in line
    assert kind in line


BROKEN = {
    "moov missing": (lambda p: drop_box(barcode_video(p / "a.mp4"), b"moov"), "moov atom not found"),
    "moov zeroed": (lambda p: drop_box(barcode_video(p / "a.mp4"), b"moov", zero=True), "no video stream"),
    "mdat missing": (
        lambda p: drop_box(barcode_video(p / "a.mp4", container_options={"movflags": "faststart"}), b"mdat"),
        "no frame could be decoded",
    ),
    "only sound": (lambda p: sound_only(p / "a.mp4"), "no video stream, only audio"),
    "only a cover": (lambda p: cover_only(p / "a.mp4"), "no video stream, only audio, cover art"),
    "only subtitles": (lambda p: only_subtitles(barcode_video(p / "a.mkv")), "no video stream"),
}


@HOSTILE
@pytest.mark.parametrize("name", BROKEN)
def test_file_without_a_picture_is_one_line(tmp_path, name):
    make, reason = BROKEN[name]
    assert reason in error_of(make(tmp_path))


@TRUE_FRAMES
def test_size_that_changes_midway(tmp_path):
    one, two = barcode_video(tmp_path / "1.ts", 6), barcode_video(tmp_path / "2.ts", 6, (96, 64))
    (tmp_path / "both.ts").write_bytes(one.read_bytes() + two.read_bytes())
    assert "changes from 64x48 to 96x64" in error_of(tmp_path / "both.ts")


HUGE = {  # where each container says how large the picture is
    "a.mov": ({"codec": "qtrle", "pix_fmt": "rgb24"}, b"rle ", 24, ">HH"),
    "a.avi": ({"codec": "huffyuv", "pix_fmt": "rgb24"}, b"strf", 8, "<ii"),
    "a.mkv": ({"codec": "ffv1", "size": (320, 256)}, b"\xb0\x82\x01\x40\xba\x82\x01\x00", -6, ">HHH"),
}


@LIMITED
@pytest.mark.parametrize("name", HUGE)
def test_declared_size_is_checked_before_it_is_allocated(tmp_path, name):
    settings, *where = HUGE[name]
    values = (65535, 0xBA82, 65535) if name == "a.mkv" else (65535, 65535)  # BA 82: the element between the two
    path = patch(barcode_video(tmp_path / name, 2, **settings), *where, *values)
    assert "65535x65535" in error_of(path)


@TRUE_FRAMES
def test_declared_size_that_the_stream_corrects(tmp_path):
    path = patch(barcode_video(tmp_path / "a.mp4", 3), b"avc1", 24, ">HH", 65535, 65535)
    assert decode(path)[0] == [0, 1, 2]


LIMITS = {
    "max_bytes": (100, "bytes are over the limit of 100"),
    "max_pixels": (64 * 48 - 1, "64x48 pixels are over the limit of 3071"),
    "max_frames": (11, "12 frames are over the limit of 11"),
}


@LIMITED
@pytest.mark.parametrize("name", LIMITS)
def test_rejects_what_is_over_a_limit(tmp_path, name):
    value, reason = LIMITS[name]
    assert reason in error_of(barcode_video(tmp_path / "a.mp4", 12), **{name: value})


@LIMITED
@ISOLATED
def test_rejects_pictures_that_do_not_fit_in_memory(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 3, (3840, 2160), options={"preset": "ultrafast"})
    assert "decoding needs more than 160 MiB of memory" in error_of(path, again=True, memory=160 * 2**20)


@LIMITED
@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mpg"])
def test_rejects_more_frames_than_the_limit_where_none_are_declared(tmp_path, name):
    path = barcode_video(tmp_path / name, 12, codec="mpeg1video" if name == "a.mpg" else "libx264")
    assert "frames are over the limit of 11" in error_of(path, max_frames=11)
    assert decode(path, max_frames=12)[2].frames_read == 12


@LIMITED
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_rejects_limits_that_are_none(value):
    with pytest.raises(ValueError, match="max_frames must be a positive number"):
        Limits(max_frames=value)


# --- paths ------------------------------------------------------------------------------------------------------------


@HOSTILE
def test_what_is_no_file_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    os.mknod(tmp_path / "socket.mp4", stat.S_IFSOCK | 0o600)
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "empty.mp4").touch()
    reasons = {
        tmp_path / "missing.mp4": "No such file",
        tmp_path / "fifo.mp4": "not a file but a pipe",
        tmp_path / "socket.mp4": "not a file but a socket",
        tmp_path / "dangling.mp4": "link to a missing file",
        tmp_path / "loop.mp4": "symbolic links",
        tmp_path / "empty.mp4": "empty file",
        tmp_path: "not a file but a folder",
        Path("/dev/zero"): "not a file but a device",
        tmp_path / ("n" * 300): "File name too long",
    }
    unreachable = {"No such file", "link to a missing file", "symbolic links", "File name too long"}
    with OpenWatch(tmp_path / "fifo.mp4") as watch:
        for path, reason in reasons.items():
            assert reason in error_of(path, again=reason in unreachable)
        assert not watch.opened()
    with pytest.raises(SDRError, match="null"):
        open_video("a\0b")


@HOSTILE
def test_unreadable_file(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 2)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything; nobody may not
        with pytest.raises(SDRError, match="Permission denied"):
            open_video(path)
    finally:
        os.seteuid(user)


NAMES = {
    "spaces": b" a  b .mp4",
    "newline": b"a\nb.mp4",
    "dash": b"-i.mp4",
    "quotes": b"'\"`$(x).mp4",
    "pattern": b"%05d.mp4",
    "protocol": b"concat:a|b.mp4",
    "pipe": b"pipe:0",
    "not utf-8": b"\xff\xfe.mp4",
    "255 bytes": b"n" * 251 + b".mp4",
    "other ending": b"video.txt",
    "no ending": b"video",
}


@HOSTILE
def test_names_change_nothing(tmp_path, monkeypatch):
    source = barcode_video(tmp_path / "source.mp4", 3).read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in NAMES.values():
        Path(os.fsdecode(name)).write_bytes(source)
        assert decode(name)[0] == [0, 1, 2]  # relative, as bytes
    for name in NAMES.values():
        Path(os.fsdecode(name)).write_bytes(b"text")
        assert "not a video" in error_of(os.fsdecode(name))


@HOSTILE
def test_link_to_a_file_is_followed(tmp_path):
    barcode_video(tmp_path / "a.mp4", 3)
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    assert decode(tmp_path / "link.mp4")[0] == [0, 1, 2]


@TRUE_FRAMES
def test_file_that_changes_between_passes(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 3)
    with open_video(path) as opened:
        list(opened.frames())
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(SDRError, match="changed while it was being read") as caught:
            next(opened.frames())
        assert caught.value.again


# --- nothing else is ever opened --------------------------------------------------------------------------------------

IN_OPEN = 0x20
IN_NONBLOCK = os.O_NONBLOCK


class OpenWatch:
    """Tells whether anybody, in any process, has opened a file (Linux inotify)."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(IN_NONBLOCK)
        assert libc.inotify_add_watch(self.fd, os.fsencode(path), IN_OPEN) >= 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self.fd)

    def opened(self) -> bool:
        try:
            return bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?><MPD type="static" mediaPresentationDuration="PT1S"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1"><BaseURL>{}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=control:{}\n",
}
ENDINGS = {"hls": "m3u8", "concat": "ffconcat", "dash": "mpd", "sdp": "sdp"}


@pytest.fixture
def second(tmp_path):
    """A video that a playlist may point at, and the watch on it."""
    path = barcode_video(tmp_path / "second.mp4", 3)
    with OpenWatch(path) as watch:
        yield path, watch


@HOSTILE
def test_the_watch_can_see_a_playlist_being_followed(tmp_path, second):
    import av

    path, watch = second
    playlist = tmp_path / "a.ffconcat"
    playlist.write_text(PLAYLISTS["concat"].format(path.name))
    with av.open(str(playlist), format="concat"):
        pass
    assert watch.opened()


@HOSTILE
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_refused_and_not_followed(tmp_path, second, kind):
    path, watch = second
    for target in (path.name, str(path), f"file:{path}", "http://127.0.0.1:9/x.mp4"):
        for name in (f"a.{ENDINGS[kind]}", "a.mp4", "a.ts"):
            (tmp_path / name).write_text(PLAYLISTS[kind].format(target))
            assert "not a video" in error_of(tmp_path / name)
    assert not watch.opened()


@HOSTILE
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_the_decoder_itself_can_open_nothing(tmp_path, second, kind, monkeypatch):
    """With the check of the first bytes out of the way, a playlist's demuxer still gets no file and no address."""
    path, watch = second
    monkeypatch.setattr(video, "demuxer_of", lambda path, fd: kind)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        for target in (path.name, str(path), f"file:{path}", f"http://127.0.0.1:{server.getsockname()[1]}/x.mp4"):
            (tmp_path / "a.mp4").write_text(PLAYLISTS[kind].format(target))
            assert "decoder process" not in error_of(tmp_path / "a.mp4", seconds=20)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not watch.opened()


@HOSTILE
def test_a_track_that_lies_in_another_file_is_not_followed(tmp_path, second):
    path, watch = second
    pointing = point_elsewhere(barcode_video(tmp_path / "a.mov", 3), path)
    assert "no frame could be decoded" in error_of(pointing)
    assert not watch.opened()
    import av

    with av.open(str(pointing), options={"enable_drefs": "1", "use_absolute_path": "1"}):
        assert watch.opened()


@ISOLATED
def test_worker_may_open_no_descriptor(tmp_path):
    with open_video(barcode_video(tmp_path / "a.mp4", 3)) as opened:
        limits = Path(f"/proc/{opened._ready._process.pid}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert rows["Max open files"] == ["0", "0"]
    assert rows["Max address space"] == [str(2**30)] * 2
    assert rows["Max core file size"] == ["0", "0"]


# --- the decoding process ---------------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def assert_no_children():
    """No decoder, alive or a zombie, whose command line is empty; other tests have children of their own."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert [command for command in commands if not command or b"decode_worker" in command] == []


@ISOLATED
def test_the_decoder_gets_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for name in ("API_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "not to be told")
    with open_video(barcode_video(tmp_path / "a.mp4", 40, (640, 480))) as opened:
        environment = Path(f"/proc/{opened._workers[0]._process.pid}/environ").read_bytes()
    assert b"not to be told" not in environment
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
    assert {"LC_ALL", *SET} <= names
    assert all(name.startswith((*KEPT, *SET)) for name in names)


@ISOLATED
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_worker_is_one_failed_file(tmp_path, number):
    # pictures of 640x480: far more than the pipe holds, so the worker still runs when the first one is here
    path = barcode_video(tmp_path / "a.mp4", 40, (640, 480))
    with open_video(path) as opened:
        frames = opened.frames()
        next(frames)
        os.kill(opened._workers[0]._process.pid, number)
        with pytest.raises(SDRError, match=rf"decoder process died \(signal {int(number)}\)$") as caught:
            list(frames)
        assert caught.value.again == (number != signal.SIGSEGV)
        assert read_barcode(next(opened.frames())[1]) == 0  # and the next pass is whole again
    assert_no_children()


@ISOLATED
@LIMITED
def test_stuck_worker_is_given_up_in_time(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 40, (640, 480))
    with open_video(path, limits=Limits(seconds=1)) as opened:
        frames = opened.frames()
        next(frames)
        os.kill(opened._workers[0]._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(SDRError, match="not decoded within 1 s") as caught:
            list(frames)
        assert caught.value.again
        assert time.monotonic() - start < 2
    assert_no_children()


LARGER_THAN_THE_PIPE = (1280, 720)


def read_from_a_halting_worker(opened, frames) -> None:
    """Halts the worker for 0.4 s before each frame."""
    for _ in range(20):
        process = opened._workers[0]._process
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.4, process.send_signal, (signal.SIGCONT,)).start()
        next(frames)


@ISOLATED
def test_short_waits_add_up(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 20, LARGER_THAN_THE_PIPE)
    with open_video(path, limits=Limits(seconds=1.5)) as opened:
        with pytest.raises(SDRError, match=r"not decoded within 1\.5 s"):
            read_from_a_halting_worker(opened, opened.frames())
        time.sleep(0.5)  # the last timer
    assert_no_children()


@ISOLATED
def test_time_of_a_slow_reader_is_not_the_decoders(tmp_path):
    path = barcode_video(tmp_path / "a.mp4", 6, LARGER_THAN_THE_PIPE)
    with open_video(path, limits=Limits(seconds=1.5)) as opened:
        for _ in opened.frames():
            time.sleep(0.4)
        assert opened.frames_read == 6


@HOSTILE
def test_nothing_is_left_behind(tmp_path):
    good = barcode_video(tmp_path / "good.mp4", 40, (320, 240))
    bad = cut(barcode_video(tmp_path / "bad.mp4", 3), 0.5)
    text = tmp_path / "text.mp4"
    text.write_text("text")
    before = open_descriptors(), threading.active_count()
    for _ in range(10):
        with open_video(good) as opened:
            next(opened.frames())  # abandoned midway
        with pytest.raises(TypeError), open_video(good) as opened:
            [len(seconds) for seconds, _ in opened.frames()]  # an error of the reader's own
        with open_video(good) as opened:
            pass  # never read
        for path in (bad, text):
            with pytest.raises(SDRError):
                open_video(path)
        assert_no_children()
    assert (open_descriptors(), threading.active_count()) == before


@ISOLATED
def test_closed_video_says_so(tmp_path):
    opened = open_video(barcode_video(tmp_path / "a.mp4", 3))
    frames = opened.frames()
    next(frames)
    opened.close()
    opened.close()
    for stale in (frames, opened.frames()):
        with pytest.raises(ValueError, match="the video is closed"):
            next(stale)


@ISOLATED
def test_decoder_imports_neither_torch_nor_numpy():
    script = f"import runpy, sys; runpy.run_path({decode_worker.__file__!r}); import av; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "sdr"} & set(done.stdout.split())


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(path) -> int:
    """Bytes that the decoding process of a whole pass had at most."""
    fd = os.open(path, os.O_RDONLY)
    job = {"fd": fd, "demuxer": "mov", "decoder": "pyav", **vars(Limits())}
    command = [sys.executable, "-c", PEAK, str(fd), sys.executable, "-P", decode_worker.__file__, json.dumps(job)]
    done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=True)
    os.close(fd)
    return int(done.stdout) * 1024


@TRUE_FRAMES
def test_memory_does_not_grow_with_length(tmp_path):
    short, long = (
        barcode_video(tmp_path / f"{n}.mp4", n, (640, 480), options={"preset": "ultrafast"}) for n in (30, 200)
    )
    # 170 more frames are 157 MB of RGB
    assert peak_memory(long) - peak_memory(short) < 20e6


@LIMITED
@pytest.mark.slow
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx265", "yuv420p10le"), ("libx264", "yuv420p")])
def test_largest_pictures_fit_in_memory(tmp_path, codec, pix_fmt):
    options = {"preset": "ultrafast", **(QUIET_265 if codec == "libx265" else {"refs": "16"})}
    path = barcode_video(tmp_path / "a.mp4", 20, (3840, 2160), codec=codec, pix_fmt=pix_fmt, options=options)
    assert decode(path)[0] == list(range(20))
    assert peak_memory(path) <= 2**30


# --- clips ------------------------------------------------------------------------------------------------------------

CLIPS = {
    (1, 4, 4): [[0, 0, 0, 0]],
    (2, 5, 4): [[0, 1, 0, 1, 0]],
    (3, 8, 4): [[0, 1, 2, 1, 0, 1, 2, 1]],
    (4, 4, 4): [[0, 1, 2, 3]],
    (5, 4, 4): [[0, 1, 2, 3], [1, 2, 3, 4]],
    (8, 4, 4): [[0, 1, 2, 3], [4, 5, 6, 7]],
    (6, 4, 1): [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]],
    (9, 2, 5): [[0, 1], [5, 6], [7, 8]],
}


@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_clips(case):
    length, num_frames, stride = case
    clips = sample_clips(length, num_frames, stride=stride)
    assert clips.dtype == np.int64
    assert clips.tolist() == CLIPS[case]


@pytest.mark.parametrize("name", ["length", "num_frames", "stride"])
def test_clips_reject_sizes_below_one(name):
    sizes = {"length": 9, "num_frames": 4, "stride": 4, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        sample_clips(sizes["length"], sizes["num_frames"], stride=sizes["stride"])
