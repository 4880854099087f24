"""A run of scoring that is killed or asked to end, at any moment and any number of times, ends as one that was not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import draws
import pytest
import score_runs
from forked import Commands, StubDetector, commands

from sdr.cli import main

pytestmark = pytest.mark.promise(row="atomic")

VIDEOS = 6
FAST = [("stub_detector",)]
EXITS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}


@pytest.fixture(scope="module")
def sdr(tmp_path_factory) -> Commands:
    with commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return score_runs.make_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return score_runs.make_folder(tmp_path_factory.mktemp("videos") / "videos", VIDEOS)


class Whole(NamedTuple):
    """A run that was let alone: its folder, its results, the seconds that it took, and what it left of detections."""

    out: Path
    results: dict
    seconds: float
    cache: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sdr, videos, weights) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    out, cache = folder / "out", folder / "cache"
    for _ in range(2):  # the first to learn what is imported
        shutil.rmtree(folder)
        folder.mkdir()
        ended = sdr.run(*score_runs.words(videos, weights, out, cache), prepare=FAST)
        assert ended.code == 1, ended.lines  # one of the videos is none
    found = score_runs.results(out)
    assert [row["state"] == "inconclusive" for row in found["table"]] == [False] * (VIDEOS - 1) + [True]
    return Whole(out, found, ended.seconds, cache)


def kept(out: Path) -> dict[str, int]:
    """Names of the results on disk and the times at which they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "videos").glob("[!.]*")}


@pytest.mark.promise(row="kill -9")
@pytest.mark.promise(row="pre-emption")
@pytest.mark.parametrize("name", EXITS)
def test_killed_runs_end_like_one_that_was_not(tmp_path, sdr, videos, weights, whole, name, record_property):
    """No result is computed twice, no line is lost or doubled, nothing half written stays."""
    rng, out = draws.draw(f"score {name}", 0), tmp_path / "out"
    words = score_runs.words(videos, weights, out, tmp_path / "cache")
    kills = max(3, draws.KILLS // 3) if name == "SIGKILL" else 2
    again = draws.replay(f"tests/test_score_killed.py -k {name}", 0)
    done, landed, seconds, slowest = {}, 0, whole.seconds, 0.0
    while landed < kills:
        child = sdr.start(*words, prepare=FAST)
        time.sleep(float(rng.uniform(0.2, 0.8)) * seconds)
        child.kill(getattr(signal, name))
        began = time.monotonic()
        ended = child.wait()
        slowest = max(slowest, time.monotonic() - began)
        assert ended.code in (EXITS[name], -getattr(signal, name), 1), ended.lines
        now = kept(out) if out.exists() else {}
        assert now.items() >= done.items(), f"a finished result was lost or computed again\n{again}"
        done = now
        if ended.code == 1:  # it had come to its end
            assert score_runs.results(out) == whole.results
            shutil.rmtree(out)
            done, seconds = {}, 0.8 * seconds
            continue
        landed += 1
        if ended.code == EXITS[name] and name != "SIGKILL":
            assert "Traceback" not in "".join(ended.lines)
            assert ended.lines[-1].startswith("sdr score: interrupted")
            if "after" in ended.lines[-1]:  # else it had not begun to score
                assert ended.lines[-1].endswith(f"after {len(done)} of {VIDEOS} videos; the same command goes on")
                assert len((out / "scores.jsonl").read_text().splitlines()) == len(done)
    assert slowest < 30
    last = sdr.run(*words, prepare=FAST)
    assert last.code == 1, last.lines
    assert kept(out).items() >= done.items()
    assert score_runs.results(out) == whole.results, again
    assert list(out.rglob(".*")) == []
    record_property(f"runs of scoring ended by {name}", kills)


class PowerCut(BaseException):
    """Ends a run where nothing can hold it up."""


@pytest.fixture
def here(tmp_path, videos, weights, whole, monkeypatch) -> list[str]:
    """Words of a run in this process."""
    monkeypatch.setattr("sdr.detectors.load_detector", StubDetector)
    return score_runs.words(videos, weights, tmp_path / "out", whole.cache)


@pytest.mark.promise(row="kill -9")
def test_cut_off_at_any_write_loses_nothing(tmp_path, here, monkeypatch, whole):
    """One moment after the other: before a rename, after it, and in the middle of a line of the log."""
    replace, count = os.replace, 0

    def before(*arguments):
        raise PowerCut

    def after(*arguments):
        replace(*arguments)
        if Path(arguments[1]).suffix == ".npz":
            raise PowerCut

    def torn(path, line):
        with open(path, "a") as file:
            file.write(line[: len(line) // 2])
        raise PowerCut

    for name, cut in (("os.replace", before), *[("os.replace", after), ("sdr.score_command.append_line", torn)] * 3):
        with monkeypatch.context() as patch:
            patch.setattr(name, cut)
            with pytest.raises(PowerCut):
                main(here)
        now = len(kept(tmp_path / "out"))
        assert now == count + (cut is not before)  # one more is done, and none was done again
        count = now
        log = tmp_path / "out/scores.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line)["path"] for line in lines if line.endswith("}")]
        assert len(set(rows)) == len(rows) >= count - (cut is not before)  # the last may have no line yet
    assert main(here) == 1
    assert score_runs.results(tmp_path / "out") == whole.results


def test_what_is_renamed_is_on_the_disk_and_its_folder_after_it(here, monkeypatch):
    """A power cut can empty a file that was renamed before it was synced."""
    synced, renamed, fsync, replace = [], [], os.fsync, os.replace

    def note_sync(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def note_rename(source, target):
        assert os.stat(source).st_ino in synced, f"{target} was not synced"
        replace(source, target)
        renamed.append((Path(target), len(synced)))

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("os.replace", note_rename)
    assert main(here) == 1
    assert len({path for path, _ in renamed if path.suffix == ".npz"}) == VIDEOS
    assert {path.name for path, _ in renamed} >= {"scores.jsonl", "scores.csv", "report.html"}
    assert all(path.parent.stat().st_ino in synced[place:][:1] for path, place in renamed)


# --- what counts as done ---------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """The folder of ``here``'s run, once that has ended."""
    return Path(shutil.copytree(whole.out, tmp_path / "out"))


def scored(monkeypatch) -> list[str]:
    """Names of the videos that are scored from now on."""
    from sdr.score import Scorer

    names, call = [], Scorer.__call__

    def note(self, path, **options):
        names.append(Path(path).name)
        return call(self, path, **options)

    monkeypatch.setattr(Scorer, "__call__", note)
    return names


def test_again_scores_nothing_and_writes_the_same(here, finished, whole, monkeypatch, capsys):
    names = scored(monkeypatch)
    assert main(here) == 1
    assert names == []
    assert f"note: {VIDEOS} of {VIDEOS} videos have been scored before, and are not again" in capsys.readouterr().err
    assert score_runs.results(finished) == whole.results


@pytest.mark.parametrize(
    ("more", "again", "said"),
    [
        (["--threshold", "0.466", "--reduce", "max", "--batch_size", "1"], [], "are not again"),
        (["--limits.max_frames", "9000"], ["5.mp4"], "limits was "),  # may let the one without a score pass
        (["--stride", "2"], [f"{n}.mp4" for n in range(VIDEOS)], "stride was 4, now 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_other_settings_score_what_they_change(tmp_path, here, finished, monkeypatch, capsys, more, again, said):
    names = scored(monkeypatch)
    assert main([*here, *more]) == 1
    assert names == again
    assert said in capsys.readouterr().err
    states = {row["state"] for row in score_runs.results(finished)["table"]}
    assert states == {"real", "inconclusive"} | ({"fake"} if more[0] == "--threshold" else set())


def test_other_weights_score_all_again(tmp_path, here, finished, monkeypatch, capsys):
    names = scored(monkeypatch)
    other = score_runs.make_weights(tmp_path / "other.safetensors", seed=1)
    assert main([*here, "--weights", str(other)]) == 1
    assert len(names) == VIDEOS
    assert f"note: {VIDEOS} videos are scored again, with other settings: weights was " in capsys.readouterr().err


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_video_that_has_changed_is_scored_again(tmp_path, here, videos, finished, monkeypatch, shift):
    """Its time is compared as equal or not: a clock that was set back makes new files look old."""
    copy = Path(shutil.copytree(videos, tmp_path / "copy"))
    for name in ("2.mp4", "3.mp4", "4.mp4", "5.mp4"):
        (copy / name).unlink()
    here[1] = str(copy)
    assert main(here) == 0
    names = scored(monkeypatch)
    score_runs.make_video(copy / "0.mp4", 77)
    time_before = (videos / "0.mp4").stat().st_mtime_ns
    os.utime(copy / "0.mp4", ns=(time_before, time_before + shift * 10**12))
    os.utime(copy / "1.mp4", ns=(0, (copy / "1.mp4").stat().st_mtime_ns + shift))  # touched by one nanosecond
    assert main(here) == 0
    assert names == ["0.mp4", "1.mp4"]


def test_a_video_that_changes_while_it_is_scored_is_scored_again(here, tmp_path, videos, monkeypatch):
    from sdr.score import Scorer

    copy = Path(shutil.copytree(videos, tmp_path / "copy"))
    here[1], call = str(copy), Scorer.__call__

    def change(self, path, **options):
        result = call(self, path, **options)
        if path.name == "2.mp4":
            os.utime(path, (0, 0))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", change)
        assert main(here) == 1
    names = scored(monkeypatch)
    assert main(here) == 1
    assert names == ["2.mp4"]


def test_other_videos_and_names_in_one_folder(tmp_path, here, videos, finished, monkeypatch):
    """More videos score those alone; the same by another path are known; each run writes of its own alone."""
    names = scored(monkeypatch)
    more = score_runs.make_video(tmp_path / "more.mp4", 9)
    monkeypatch.chdir(videos)
    assert main([here[0], "1.mp4", str(more), *here[2:]]) == 0
    assert names == ["more.mp4"]
    assert [row["path"] for row in score_runs.results(finished)["table"]] == ["1.mp4", str(more)]
    assert main(here) == 1
    assert names == ["more.mp4"]


@pytest.mark.parametrize("fault", [OSError(24, "Too many open files"), MemoryError()], ids=str)
def test_a_fault_of_the_machine_is_tried_again(here, tmp_path, monkeypatch, whole, fault):
    def fail(self, frame):
        raise fault

    again = [*here, "--out", str(tmp_path / "new"), "--cache", str(tmp_path / "empty")]
    with monkeypatch.context() as patch:
        patch.setattr(StubDetector, "__call__", fail)
        assert main(again) == 1
    table = score_runs.results(tmp_path / "new")["table"]
    assert table[0]["reason"].startswith(f"{type(fault).__name__}: ")
    names = scored(monkeypatch)
    assert main(again) == 1
    assert names == [f"{n}.mp4" for n in range(VIDEOS - 1)]  # and not the file that is no video
    assert score_runs.results(tmp_path / "new") == whole.results


@pytest.mark.promise(row="isolation")
def test_a_decoder_that_is_killed_is_one_video_and_is_tried_again(here, tmp_path, monkeypatch, whole):
    """The system kills for want of memory; a signal of a terminal or of a queue goes to every process."""
    from sdr.decoding import Worker

    header = Worker.read_header

    def killed(worker):
        if worker.path.name == "1.mp4":
            worker._process.kill()
            worker._process.wait()
            raise worker._death()
        return header(worker)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "read_header", killed)
        assert main(here) == 1
    table = score_runs.results(tmp_path / "out")["table"]
    assert [row["reason"] for row in table[:3]] == ["", "decoder process died (signal 9)", ""]
    names = scored(monkeypatch)
    assert main(here) == 1
    assert names == ["1.mp4"]
    assert score_runs.results(tmp_path / "out") == whole.results
