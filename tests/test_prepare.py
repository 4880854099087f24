"""`sdr prepare`: every layout to a cache, killed and resumed; the face that is meant; bad videos; and the check."""

import csv
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import draws
import numpy as np
import pytest
import video_files
from forked import Commands, commands

from sdr import SDRError
from sdr.cache_check import check_cache
from sdr.cli import main
from sdr.clip_cache import ClipCache, read_manifest, read_shard, write_manifest, write_shard
from sdr.cutting import Job, PrepareConfig, choose_track, cut_record
from sdr.datasets import Record
from sdr.detectors import Faces, load_detector
from sdr.faces import Track, cut_clips, detect_faces, plan_clips, track_faces
from sdr.synth import synthesize
from sdr.video import open_video

SIZE, T = 32, 8
SETTINGS = ("--size", SIZE, "--num_frames", T, "--stride", T, "--min_frames", 4)
LAYOUTS = ("ffpp", "celebdf", "dfdc", "deepfakebench")
SPAWNED = LAYOUTS[0]  # whose workers are not forks, but started as for a user
SOAK = draws.KILLS >= 50  # CI takes half of the layouts: what resumes does not know them
KILLED = (
    [*zip(LAYOUTS, ["SIGKILL", "SIGTERM"] * 2, strict=True)] if SOAK else [(SPAWNED, "SIGKILL"), ("dfdc", "SIGTERM")]
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_dataset(out: Path, layout: str = "ffpp") -> Path:
    synthesize(out, identities=8, frames=12, size=64, crf=[23], methods=["FullJitter"], layout=layout, workers=1)
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("prepare") / "data")


@pytest.fixture(scope="module")
def detections(tmp_path_factory) -> Path:
    """Shared by the tests, so that each video is searched for faces once."""
    return tmp_path_factory.mktemp("detections")


@pytest.fixture(scope="module")
def finished(dataset, detections, tmp_path_factory) -> Path:
    """A cache of ``dataset``."""
    out = tmp_path_factory.mktemp("finished") / "cache"
    assert run(dataset, out, "--cache", detections) == 0
    return out


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch):
    """Quick ones. ``finished``, made before and what others are compared with, has workers as a user's."""
    monkeypatch.setattr("sdr.prepare.get_context", lambda method: get_context("fork"))


@pytest.fixture
def cache(finished, tmp_path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def arguments(root: Path, out: Path, *more, layout: str = "ffpp") -> list[str]:
    return list(map(str, ["prepare", root, "--layout", layout, "--out", out, *SETTINGS, *more]))


def run(root: Path, out: Path, *more, layout: str = "ffpp") -> int:
    return main(arguments(root, out, *more, layout=layout))


def one_line(printed: str) -> str:
    """The one line that is not the progress bar's."""
    (line,) = [x for x in printed.splitlines() if x.startswith("sdr prepare: ")]
    assert "Traceback" not in printed
    return line


# --- every layout, killed and resumed --------------------------------------------------------------------------------


def start(*command: str, **options) -> subprocess.Popen:
    code = "import sys; from sdr.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *command], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def sdr(tmp_path_factory) -> Commands:
    with commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.mark.slow
@pytest.mark.promise(row="kill -9")
@pytest.mark.promise(row="atomic")
@pytest.mark.parametrize(("layout", "name"), KILLED)
def test_killed_at_random_points_and_resumed_is_byte_identical(tmp_path, sdr, layout, name):
    root = make_dataset(tmp_path / "data", layout)
    whole = tmp_path / "whole"
    command = arguments(root, whole, "--cache", tmp_path / "detections", layout=layout)
    seconds = finish(sdr, command)
    assert len(read_manifest(whole)["video"]) >= 16

    out, chance = tmp_path / "killed", draws.draw(f"prepare {layout} {name}", 0)
    command = arguments(root, out, "--cache", tmp_path / "none", layout=layout)
    shards: set[str] = set()
    for _ in range(2 if layout == SPAWNED else 3):
        if layout == SPAWNED:
            child = start(*command)
            wait_for_shard(out, shards, child)
            time.sleep(float(chance.uniform(0, 0.3)) * seconds)
        else:
            child = sdr.start(*command, prepare=[("fork_workers",)])
            time.sleep(float(chance.uniform(0.1, 0.9)) * seconds)
        family = children(child.pid)
        os.kill(child.pid, getattr(signal, name))
        if layout == SPAWNED:
            child.communicate()
        code = child.returncode if layout == SPAWNED else child.wait().code
        assert code in (-getattr(signal, name), 0)
        deadline = time.monotonic() + 20
        while not all(map(gone, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(map(gone, family)), "a worker outlived its parent"
        now = {name for name in files(out) if name.endswith(".tar")}
        assert now >= shards, "a finished shard was lost"
        shards = now
    stamps = {name: (out / name).stat().st_mtime_ns for name in shards}
    finish(sdr, command)
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == stamps, "a finished shard was written again"
    assert files(out) == files(whole), draws.replay(f"tests/test_prepare.py -k 'killed_at_random and {layout}'", 0)
    assert main(["prepare", "--check", str(out)]) == 0


def wait_for_shard(out: Path, shards: set[str], process: subprocess.Popen) -> None:
    """Until there is another than these, or the process has ended."""
    while process.poll() is None and not {str(p.relative_to(out)) for p in out.rglob("*.tar")} - shards:
        time.sleep(0.05)


def finish(sdr: Commands, command: list[str]) -> float:
    """Run it to its end, which must be a good one; the seconds that it took."""
    ended = sdr.run(*command, prepare=[("fork_workers",)])
    assert ended.code == 0, ended.lines
    return ended.seconds


def test_again_changes_nothing(dataset, detections, cache):
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*.tar")}
    content = files(cache)
    assert run(dataset, cache, "--cache", detections, "--workers", 1) == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.tar")} == before
    assert files(cache) == content


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_manifest_and_clips_are_the_videos(dataset, detections, finished):
    """Labels and splits as `sdr synth` lists them; every clip as the parts cut it from the file itself."""
    table = read_manifest(finished)
    with open(dataset / "videos.csv", newline="") as file:
        truth = {row["path"]: row for row in csv.DictReader(file)}
    assert set(table["video"]) == set(truth)
    for i, video in enumerate(table["video"]):
        told = (str(table["label"][i]), table["split"][i], table["method"][i])
        assert told == tuple(truth[video][name] for name in ("label", "split", "method"))
    clips = ClipCache(finished)
    assert clips.shape == (T, SIZE, SIZE, 3)
    for video in sorted(truth)[::5]:
        with open_video(dataset / video) as opened:
            tracks = track_faces(detect_faces(opened, load_detector(), cache=detections).faces)
            longest = max(tracks, key=lambda track: len(track.scores))
            plans = plan_clips([longest], num_frames=T, stride=T, size=SIZE, min_frames=4)
            cut = dict(cut_clips(opened, plans, SIZE))
            rows = [i for i, name in enumerate(table["video"]) if name == video]
            assert len(rows) == len(cut) >= 2
            for i in rows:
                number = table["clip"][i]
                assert np.array_equal(clips.read(i), cut[number])
                assert table["frames"][i] == plans[number].frames.tolist()
                assert np.array_equal(np.reshape(table["transform"][i], (2, 3)), plans[number].transform)
                assert (table["video_sha256"][i], table["decoder"][i]) == (opened.sha256, "pyav")
                assert json.loads(table["settings"][i])["size"] == SIZE


def test_at_most_so_many_clips_evenly_spread(tmp_path, dataset, detections, finished):
    out = tmp_path / "cache"
    more = ("--cache", detections, "--split", '["train"]')
    settings = ("--stride", 1, "--clips_per_video", 3)
    assert run(dataset, out, *more, *settings) == 0
    table = read_manifest(out)
    assert set(table["split"]) == {"train"}
    first = {}
    for video, frames in zip(table["video"], table["frames"], strict=True):
        first.setdefault(video, []).append(frames[0])
    assert list(first.values()).count([0, 2, 4]) >= len(first) - 2  # 12 frames: clips from 0 to 4; tracks may break


def test_shards_open_as_tars_of_numpy_arrays(finished):
    path = sorted(finished.rglob("*.tar"))[0]
    import io
    import tarfile

    with tarfile.open(path) as tar:
        names = tar.getnames()
        assert [name.split(".")[1] for name in names] == ["npy", "json"] * (len(names) // 2)
        clip = np.load(io.BytesIO(tar.extractfile(names[0]).read()))
    assert (clip.shape, clip.dtype) == ((T, SIZE, SIZE, 3), np.uint8)
    cache = ClipCache(finished)
    assert np.array_equal(clip, cache.read(place(cache, path)))


def place(cache: ClipCache, path: Path) -> int:
    """Index of a shard's first clip."""
    table = read_manifest(cache.folder)
    return table["shard"].index(path.relative_to(cache.folder).as_posix())


# --- the face that is meant ------------------------------------------------------------------------------------------


def track(start: int, length: int, left: int) -> Track:
    boxes = np.tile(np.float32([left, 10, left + 20, 30]), (length, 1))
    return Track(start, boxes, np.zeros((length, 5, 2), np.float32), np.ones(length, np.float32))


def record(path: Path, **fields) -> Record:
    return Record(path, 1, "train", "Fake", "0", **fields)


@pytest.fixture
def mask_of_the_right(tmp_path) -> Path:
    """12 frames, white where the right face is."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[12:28, 36:52] = 255
    video_files.encode(tmp_path / "mask.mp4", [picture] * 12)
    return tmp_path / "mask.mp4"


@pytest.fixture
def two_faces(tmp_path):
    """12 frames of the mask's size, dark on the left and light on the right."""
    pictures = [np.full((48, 64, 3), 40, np.uint8) for _ in range(12)]
    for picture in pictures:
        picture[:, 32:] = 200
    video_files.encode(tmp_path / "two.mp4", pictures)
    with open_video(tmp_path / "two.mp4") as video:
        yield video


def test_the_mask_tells_the_face(two_faces, mask_of_the_right):
    left, right = track(0, 12, 2), track(2, 9, 34)
    plain, masked = record(two_faces.path), record(two_faces.path, mask=mask_of_the_right)
    assert choose_track([left, right], plain, two_faces) == (0, "longest")
    assert choose_track([right, left], plain, two_faces) == (1, "longest")
    for tracks, index in (([left, right], 1), ([right, left], 0), ([left, track(0, 3, 34), right], 2)):
        assert choose_track(tracks, masked, two_faces) == (index, "mask")
    assert choose_track([left], masked, two_faces) == (0, "longest")


def test_equal_tracks_give_the_first(two_faces):
    assert choose_track([track(0, 5, 2), track(0, 5, 34)], record(two_faces.path), two_faces) == (0, "longest")


@pytest.mark.parametrize("wrong", ["elsewhere", "no video", "smaller", "shorter"])
def test_a_mask_that_tells_nothing_is_an_error(tmp_path, two_faces, mask_of_the_right, wrong):
    picture, mask = np.full((48, 64, 3), 255, np.uint8), tmp_path / "other.mp4"
    tracks, message = [track(0, 12, 2), track(0, 3, 34)], "is not of its video"
    if wrong == "elsewhere":
        tracks, mask, message = [track(0, 12, 0), track(0, 3, 0)], mask_of_the_right, "marks no face that was found"
    elif wrong == "no video":
        mask.write_text("text")
        message = ""
    elif wrong == "smaller":
        video_files.encode(mask, [picture[:24, :32]] * 12)
    else:
        video_files.encode(mask, [picture] * 11)
    with pytest.raises(SDRError, match=f"{mask.name}: {message}"):
        choose_track(tracks, record(two_faces.path, mask=mask), two_faces)


def test_one_face_of_two_is_cut(tmp_path, two_faces, mask_of_the_right, monkeypatch):
    """With the mask, the right face; what is said of it stands in the row."""
    points = np.float32([(5, 5), (15, 5), (10, 10), (6, 15), (14, 15)])

    class Two:
        name = "two"

        def __call__(self, frame):
            corners = np.float32([(2, 10), (34, 10)])
            boxes = np.concatenate([corners, corners + 20], 1)
            return Faces(boxes, points + corners[:, None], np.float32([0.9, 0.8]))

    monkeypatch.setattr("sdr.cutting.worker_detector", lambda name, weights: Two())
    config = PrepareConfig(num_frames=4, size=16, stride=4)
    for number, mask in enumerate((None, mask_of_the_right)):
        job = Job(tmp_path, tmp_path / f"cache{number}", config, {"detector": "two"}, "two", None, None)
        video = record(tmp_path / "two.mp4", mask=mask)
        assert cut_record(video, job) == ""
        path = job.out / job.shard(video)
        rows = read_shard(path, (4, 16, 16, 3))
        assert [(r["track"], r["tracks"], r["chosen_by"]) for r in rows] == [
            (number, 2, "mask" if number else "longest")
        ] * 3
        centre = np.frombuffer(path.read_bytes(), np.uint8)[rows[0]["offset"] + 3 * (8 * 16 + 8)]
        assert abs(int(centre) - (200 if number else 40)) < 8


def job_of(tmp_path: Path, **config) -> Job:
    config = PrepareConfig(num_frames=4, size=16, stride=4, **config)
    return Job(tmp_path, tmp_path / "cache", config, {"detector": "fake"}, "fake", None, None)


def fake_detector(call):
    """A detector of one face at the same place, whose calls go through ``call`` first."""

    class Fake:
        name = "fake"

        def __call__(self, frame):
            call(frame)
            points = np.float32([[(5, 5), (15, 5), (10, 10), (6, 15), (14, 15)]])
            return Faces(np.float32([(2, 10, 22, 30)]), points + 10, np.float32([0.9]))

    return lambda name, weights: Fake()


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), IndexError("no such axis"), MemoryError()], ids=str
)
def test_a_fault_of_the_machine_is_told_and_not_kept(tmp_path, two_faces, monkeypatch, error):
    """It is no error of writing, ends no run, and the video is tried again."""

    def fail(frame):
        raise error

    job, video = job_of(tmp_path), record(two_faces.path)
    monkeypatch.setattr("sdr.cutting.worker_detector", fake_detector(fail))
    assert cut_record(video, job).startswith(f"{type(error).__name__}: ")
    assert [p for p in job.out.rglob("*") if p.is_file()] == []
    monkeypatch.setattr("sdr.cutting.worker_detector", fake_detector(lambda frame: None))
    assert cut_record(video, job) == ""
    assert len(read_shard(job.out / job.shard(video), (4, 16, 16, 3))) == 3


def test_points_that_are_no_face_are_the_reason(tmp_path, two_faces, monkeypatch):
    job, video = job_of(tmp_path), record(two_faces.path)
    monkeypatch.setattr("sdr.cutting.worker_detector", fake_detector(lambda frame: None))
    monkeypatch.setattr("sdr.faces.similarity_transform", lambda *a: (_ for _ in ()).throw(ValueError("one point")))
    assert cut_record(video, job) == "the points that were found resemble no face"


def test_names_do_not_depend_on_how_a_path_was_typed(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path / "lists")
    names = {
        job_of(root).name(record(path))
        for root, path in (
            (tmp_path / "lists", tmp_path / "a.mp4"),
            (Path(), Path("../a.mp4")),
            (Path("../lists"), tmp_path / "lists/../a.mp4"),
        )
    }
    assert names == {f"{tmp_path}/a.mp4"}


# --- what is wrong with it -------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path, dataset) -> Path:
    """A CSV of ten good videos, and room for bad ones."""
    good = sorted((dataset / "original_sequences/youtube/c23/videos").glob("*.mp4"))
    for path in good:
        shutil.copy(path, tmp_path / path.name)
    lines = [f"{path.name},0,train" for path in good]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return tmp_path / "list.csv"


@pytest.mark.promise(row="no substitution")
def test_bad_videos_are_reported_and_nothing_else_is_lost(videos, detections, tmp_path, capsys):
    count = len(videos.read_text().splitlines()) - 1
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    video_files.encode(tmp_path / "faceless.mp4", [np.zeros((48, 64, 3), np.uint8)] * 12)
    shutil.copy(tmp_path / "000.mp4", tmp_path / "cut.mp4")
    video_files.cut(tmp_path / "cut.mp4", 0.9)
    bad = ["broken", "gone", "faceless", "cut"]
    with open(videos, "a") as file:
        file.writelines(f"{name}.mp4,1,train\n" for name in bad)
    out = tmp_path / "cache"
    more = ("--cache", detections)
    assert run(videos, out, *more, layout="csv") == 2
    line = one_line(capsys.readouterr().err)
    assert "videos cannot be used, unusable.csv tells why (--max_bad 0.01 is the share that is accepted)" in line
    assert "gone.mp4: no such file" in line  # known before any work
    with open(out / "unusable.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["gone.mp4"]
    assert run(videos, out, *more, "--max_bad", 0.5, layout="csv") == 1
    printed = capsys.readouterr()
    assert f"of {count} videos, 4 videos left out" in printed.out
    with open(out / "unusable.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert list(reasons) == [f"{name}.mp4" for name in bad]
    assert reasons["faceless.mp4"] == "no face in 12 frames"
    assert reasons["gone.mp4"] == "no such file"
    for name, reason in reasons.items():
        assert f"left out: {tmp_path / name}: {reason}" in printed.err
    table = read_manifest(out)
    assert len(set(table["video"])) == count
    assert not set(table["video"]) & set(reasons)
    # the missing one turns up and the broken one is mended: files that are others now are looked at again
    for name in ("gone", "broken"):
        shutil.copy(tmp_path / "000.mp4", tmp_path / f"{name}.mp4")
    assert run(videos, out, *more, "--max_bad", 0.5, layout="csv") == 1
    assert f"of {count + 2} videos, 2 videos left out" in capsys.readouterr().out
    assert not list(out.rglob("broken-*.json"))


def test_the_unusable_is_tried_again_on_request(videos, detections, tmp_path, capsys):
    """A video too long for the limit; with another limit it stays unusable until --retry."""
    out, more = tmp_path / "cache", ("--cache", detections, "--max_bad", 1)
    with open(videos, "a") as file:
        file.write("long.mp4,0,train\n")
    with open_video(tmp_path / "000.mp4") as video:
        pictures = [picture for _, picture in video.frames()]
    video_files.encode(tmp_path / "long.mp4", pictures * 2)
    assert run(videos, out, *more, "--limits.max_frames", 20, layout="csv") == 1
    assert "--limits.max_frames" in capsys.readouterr().err
    assert run(videos, out, *more, layout="csv") == 1
    assert run(videos, out, *more, "--retry", layout="csv") == 0
    assert len(list(out.rglob("*.json"))) == 1  # the settings


def test_a_split_file_that_names_missing_videos(tmp_path, dataset, capsys):
    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    (root / "original_sequences/youtube/c23/videos/001.mp4").unlink()
    assert run(root, tmp_path / "cache") == 2
    assert "001.mp4: no such file; 1 of " in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stride", "0"], "stride must be at least 1"),
        (["--clips_per_video", "0"], "clips_per_video must be at least 1"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--max_bad", "2"], "max_bad must lie in 0..1"),
        (["--methods", '["Nonsense"]'], "Nonsense"),
        (["--splits", "/nowhere"], "/nowhere"),
        (["--detector_weights", "/nowhere.onnx"], "/nowhere.onnx"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(dataset, tmp_path, more, message, capsys):
    assert run(dataset, tmp_path / "cache", *more) == 2
    assert message in one_line(capsys.readouterr().err)


def test_options_that_are_missing_are_named(capsys):
    assert main(["prepare", "x"]) == 2
    assert one_line(capsys.readouterr().err).endswith("needs layout and out, or --check and a cache")


def test_another_dataset_or_setting_does_not_touch_a_cache(dataset, cache, tmp_path, capsys):
    before = files(cache)
    more = ("--methods", '["FullJitter"]')
    for root, options, message in (
        (dataset, ("--size", 16), f"was written with other settings: size was {SIZE}, now 16 (choose a new folder)"),
        (dataset, ("--split", '["test"]'), "is of a video that is not in this dataset or selection"),
    ):
        assert run(root, cache, *more, *options) == 2
        assert message in one_line(capsys.readouterr().err)
        assert files(cache) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    assert run(dataset, tmp_path / "other") == 2
    assert "is not empty and was not written by sdr prepare" in one_line(capsys.readouterr().err)
    assert files(tmp_path / "other") == {"thesis.txt": b"precious"}


@pytest.mark.promise(row="kill -9")
def test_a_kill_before_the_settings_were_written(dataset, detections, tmp_path, finished):
    out = tmp_path / "cache"
    out.mkdir()
    (out / ".0123456789abcdef.tmp").write_text("{")
    assert run(dataset, out, "--cache", detections) == 0
    assert files(out) == files(finished)


def test_a_kill_between_the_clips_and_the_verdict_on_an_earlier_attempt(dataset, detections, cache, finished):
    shard = sorted(cache.rglob("*.tar"))[0]
    shard.with_suffix(".json").write_text("{}")
    assert run(dataset, cache, "--cache", detections) == 0
    assert files(cache) == files(finished)


@pytest.mark.promise(row="kill -9")
def test_a_torn_verdict_is_none(dataset, detections, cache, finished):
    shard = sorted(cache.rglob("*.tar"))[0]
    shard.unlink()
    for content in ("", "{}", "[1]", '{"reason": "no", "source": "another"}'):
        shard.with_suffix(".json").write_text(content)
        assert run(dataset, cache, "--cache", detections) == 0
        assert files(cache) == files(finished)
        shard.unlink()


@pytest.mark.parametrize("change", ["identity", "label", "file"])
@pytest.mark.promise(row="no substitution")
def test_a_video_that_has_changed_is_refused_or_cut_anew(videos, detections, tmp_path, change, capsys):
    out = tmp_path / "cache"
    assert run(videos, out, "--cache", detections, layout="csv") == 0
    before = files(out)
    if change == "file":
        shutil.copy(tmp_path / "001.mp4", tmp_path / "000.mp4")
    else:
        lines = videos.read_text().splitlines()
        lines = [lines[0] + ",identity", *(f"{line},x" for line in lines[1:])] if change == "identity" else lines
        lines = [line.replace("000.mp4,0", "000.mp4,1") for line in lines] if change == "label" else lines
        videos.write_text("\n".join(lines) + "\n")
    if change != "label":  # which is also part of a shard's name
        assert run(videos, out, "--cache", detections, layout="csv") == 2
        assert "000.mp4: its file, label, identity, mask or frames are not those" in one_line(capsys.readouterr().err)
        assert files(out) == before
        assert run(videos, out, "--cache", detections, "--retry", layout="csv") == 0
        table = read_manifest(out)
        first = table["video"].index("000.mp4")
        if change == "identity":
            assert set(table["identity"]) == {"x"}
        else:
            assert table["video_sha256"][first] == table["video_sha256"][table["video"].index("001.mp4")]
        assert check_cache(out).problems == ()
    else:
        assert run(videos, out, "--cache", detections, layout="csv") == 2
        assert "is of a video that is not in this dataset" in one_line(capsys.readouterr().err)


def test_a_limit_may_be_raised_later(dataset, detections, cache, finished):
    assert run(dataset, cache, "--cache", detections, "--limits.max_frames", 5000) == 0
    assert files(cache) == files(finished)


def test_a_csv_of_synthetic_videos_is_synthetic(dataset, detections, tmp_path):
    for number, root in enumerate((dataset, dataset / "videos.csv")):
        out = tmp_path / f"cache{number}"
        assert run(root, out, "--cache", detections, "--split", '["val"]', layout="csv") == 0
        assert ClipCache(out).settings["synthetic"] is True


def test_settings_may_change_before_the_first_clip(dataset, tmp_path, detections, finished):
    out = tmp_path / "cache"
    out.mkdir()
    (out / "prepare.json").write_text('{"size": 7}\n')
    (out / "unusable.csv").write_text("path\n")
    assert run(dataset, out, "--cache", detections) == 0
    assert files(out) == files(finished)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ffpp"])
def test_a_relative_root_gives_the_same(tmp_path, monkeypatch, layout):
    root = make_dataset(tmp_path / "data", layout)
    detections = tmp_path / "detections"
    assert run(root, tmp_path / "absolute", "--cache", detections, layout=layout) == 0
    monkeypatch.chdir(tmp_path)
    assert run(Path("data"), Path("relative"), "--cache", detections, layout=layout) == 0
    monkeypatch.chdir(root)
    assert run(Path("."), Path("../here"), "--cache", detections, layout=layout) == 0
    assert files(tmp_path / "relative") == files(tmp_path / "here") == files(tmp_path / "absolute")


def test_two_datasets_in_one_folder_are_told(tmp_path, dataset, detections, capsys):
    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    (root / "Celeb-real").mkdir()
    (root / "Celeb-synthesis").mkdir()
    assert run(root, tmp_path / "cache", "--cache", detections) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "also holds" in note
    assert "celebdf" in note.lower().replace("-", "")


def test_one_writer_at_a_time(dataset, cache, capsys):
    descriptor = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert run(dataset, cache) == 2
    finally:
        os.close(descriptor)
    assert one_line(capsys.readouterr().err).endswith("is writing there (wait for it to end, or choose another folder)")


def test_a_folder_that_cannot_be_written(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(dataset, tmp_path / "file" / "cache") == 2
    assert "cannot be made: Not a directory" in one_line(capsys.readouterr().err)
    assert run(dataset, Path("/proc/cache")) == 2
    assert one_line(capsys.readouterr().err).startswith("sdr prepare: /proc/cache: cannot be made: ")


@pytest.mark.promise(row="disk full, read-only")
def test_a_finished_cache_on_a_read_only_disk_is_one_line(dataset, cache, monkeypatch, capsys):
    """A disk that became read-only, as root meets it: every change is refused, whatever the permissions are."""

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    before = files(cache)
    assert run(dataset, cache) == 2
    assert one_line(capsys.readouterr().err).endswith(": Read-only file system")
    assert files(cache).items() >= before.items()


@pytest.mark.promise(row="disk full, read-only")
def test_a_full_disk_is_one_line_and_resumes(dataset, detections, tmp_path):
    """A limit on the size of a file stands for the disk: the same error, at the same place, in every process."""
    out = tmp_path / "cache"
    command = arguments(dataset, out, "--cache", detections, "--size", 64)

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a shard has about 200,000 bytes

    process = start(*command, preexec_fn=small_disk)
    _, printed = process.communicate()
    assert process.returncode == 2
    assert ".tar: cannot be written: File too large" in one_line(printed)
    assert not [name for name in files(out) if name.endswith((".tar", ".tmp", "manifest.parquet"))]
    assert main(command) == 0
    assert check_cache(out).problems == ()


@pytest.mark.promise(row="isolation")
def test_a_worker_that_is_killed_is_one_line(dataset, tmp_path):
    process = start(*arguments(dataset, tmp_path / "cache", "--cache", tmp_path / "detections"))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").rglob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    # the command's own: a worker's decoding process has its name too until it has become another program
    own = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in own if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    _, printed = process.communicate()
    assert process.returncode == 2
    assert "workers: one was killed, most likely for want of memory (fewer --workers)" in one_line(printed)
    assert list((tmp_path / "cache").rglob("*.tar"))


# --- the check -------------------------------------------------------------------------------------------------------


def check(cache: Path) -> list[str]:
    return [problem.removeprefix(f"{cache}/") for problem in check_cache(cache).problems]


def test_check_of_a_sound_cache_prints_its_table(finished, capsys):
    assert main(["prepare", "--check", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "all clips are as they were written" in printed
    counts = {(c.split, c.method): c for c in check_cache(finished).counts}
    table = read_manifest(finished)
    assert sum(c.clips for c in counts.values()) == len(table["clip"])
    assert sum(c.videos for c in counts.values()) == len(set(table["video"]))
    assert {c.label for (_, method), c in counts.items() if method == "real"} == {0}
    assert "FullJitter" in printed


@pytest.mark.promise(row="odd surroundings")
def test_check_finds_one_flipped_bit(cache):
    path = sorted(cache.rglob("*.tar"))[0]
    row = read_shard(path, (T, SIZE, SIZE, 3))[1]
    content = bytearray(path.read_bytes())
    content[row["offset"] + 1000] ^= 1
    path.write_bytes(content)
    assert check(cache) == [f"{path.relative_to(cache)}: clip 1 is damaged: its checksum is another"]


@pytest.mark.parametrize("damage", ["missing", "cut off", "emptied", "other clips", "not listed"])
def test_check_finds_a_wrong_shard(cache, damage):
    first, second = sorted(cache.rglob("*.tar"))[:2]
    expected = {
        "missing": "cannot be read: No such file or directory",
        "cut off": "is no shard of clips: unexpected end of data",
        "emptied": "is no shard of clips: empty file",
        "other clips": "does not hold what manifest.parquet says",
        "not listed": "is not in manifest.parquet",
    }[damage]
    if damage == "missing":
        first.unlink()
    elif damage == "cut off":
        os.truncate(first, 9000)
    elif damage == "emptied":
        os.truncate(first, 0)
    elif damage == "other clips":
        shutil.copy(second, first)
    else:
        first = Path(shutil.copy(first, first.with_name("stray.tar")))
    (problem,) = check(cache)
    assert problem == f"{first.relative_to(cache)}: {expected}"


def test_a_method_of_any_name_is_a_cell(cache, capsys):
    table = read_manifest(cache)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    write_manifest(cache, [row | {"method": "[/x]\n[red]"} for row in rows])
    assert main(["prepare", "--check", str(cache)]) == 1  # the shards say otherwise
    assert "[/x]\\n[red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", "shards/../../outside.tar"), ("shard", "/etc/passwd"), ("shard", "shards/a\0b"), ("shard", None),
        ("label", 7), ("label", None), ("split", "everything"), ("offset", -5), ("identity", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_leads_elsewhere_is_refused(cache, column, value, capsys):
    table = read_manifest(cache)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    write_manifest(cache, [row | {column: value} for row in rows])
    assert main(["prepare", "--check", str(cache)]) == 2
    assert f"its column {column} holds what sdr prepare never writes" in one_line(capsys.readouterr().err)
    with pytest.raises(SDRError, match=f"column {column}"):
        ClipCache(cache)


@pytest.mark.parametrize(
    "content", ['{"num_frames": -1, "size": 8}', '{"num_frames": true, "size": 8}', "[1]", "{", ""]
)
def test_settings_that_are_none(cache, content):
    (cache / "prepare.json").write_text(content)
    with pytest.raises(SDRError, match=r"prepare\.json: "):
        ClipCache(cache)


def test_a_shard_with_a_link_in_it(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.npy", "a.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(SDRError, match=r"a\.tar: is no shard of clips"):
        read_shard(tmp_path / "a.tar", (T, SIZE, SIZE, 3))


def test_check_finds_people_and_files_in_two_splits(cache):
    import pyarrow
    from pyarrow import parquet

    path = cache / "manifest.parquet"
    table = parquet.read_table(path)
    train, test = (table.column("split").to_pylist().index(split) for split in ("train", "test"))
    for column in ("identity", "video_sha256"):
        values = table.column(column).to_pylist()
        values[test] = values[train]
        shard = table.column("shard").to_pylist()
        values = [values[test] if shard[i] == shard[test] else v for i, v in enumerate(values)]
        table = table.set_column(table.column_names.index(column), column, pyarrow.array(values))
    parquet.write_table(table, path)
    problems = check(cache)
    assert any(line.startswith("identity ") and " is in test (" in line and " and train (" in line for line in problems)
    assert any(line.startswith("the file of sha256 ") and " is in test (" in line for line in problems)
    assert main(["prepare", "--check", str(cache)]) == 1


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "no settings", "broken settings", "no folder"])
def test_a_cache_that_is_none_is_one_line(cache, damage, capsys):
    if damage == "no folder":
        shutil.rmtree(cache)
    elif damage == "no manifest":
        (cache / "manifest.parquet").unlink()
    elif damage == "no settings":
        (cache / "prepare.json").unlink()
    elif damage == "broken settings":
        (cache / "prepare.json").write_text('{"size": "big"}')
    else:
        content = bytearray((cache / "manifest.parquet").read_bytes())
        content[len(content) // 3] ^= 1
        (cache / "manifest.parquet").write_bytes(content)
    assert main(["prepare", "--check", str(cache)]) == 2
    one_line(capsys.readouterr().err)
    if damage == "broken manifest":
        os.truncate(cache / "manifest.parquet", 2000)  # a flipped bit shows where its column is read
    with pytest.raises(SDRError):
        ClipCache(cache)


def test_a_selection_that_is_empty(finished):
    with pytest.raises(SDRError, match=r"has no clip of the split 'nowhere' \(it has test, train, val\)"):
        ClipCache(finished, split="nowhere")
    with pytest.raises(SDRError, match="has no clip of the method Deepfakes"):
        ClipCache(finished, methods=["Deepfakes"])


@pytest.mark.promise(row="atomic")
def test_shard_is_whole_or_not_there(tmp_path):
    def clips():
        yield {"clip": 0}, np.zeros((2, 4, 4, 3), np.uint8)
        raise SDRError("video.mp4", "ended")

    with pytest.raises(SDRError, match=r"video\.mp4: ended"):
        write_shard(tmp_path / "a.tar", clips())
    assert list(tmp_path.iterdir()) == []
