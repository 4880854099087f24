"""A run of scoring that is killed or asked to end, at any moment and any number of times, ends as one that was not."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import draws
import pytest
import score_runs
from forked import Commands, StubDetector, commands

from sdr.cli import main
from sdr.stopping import Stop, stopping

pytestmark = pytest.mark.promise(row="atomic")

VIDEOS = 6
EVERY = [f"{n}.mp4" for n in range(VIDEOS)]
FAST = [("stub_detector",)]
EXITS = {"SIGKILL": -9, "SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130}


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


def wait_for_change(path: Path, before: int) -> None:
    """Until a file was written since ``before``, a time of change in ns."""
    deadline = time.monotonic() + 60
    while changed(path) == before and time.monotonic() < deadline:
        time.sleep(0.01)


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def kept(out: Path) -> dict[str, int]:
    """Names of the results on disk and the times at which they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "kept").glob("[!.]*")}


@pytest.mark.promise(row="kill -9")
@pytest.mark.promise(row="pre-emption")
@pytest.mark.parametrize("name", EXITS)
def test_killed_runs_end_like_one_that_was_not(tmp_path, sdr, videos, weights, whole, name, record_property):
    """No result is computed twice, no line is lost or doubled, nothing half written stays."""
    rng, out = draws.draw(f"score {name}", 0), tmp_path / "out"
    words = score_runs.words(videos, weights, out, tmp_path / "cache")
    kills = max(3, draws.KILLS // 3) if name == "SIGKILL" else 2
    log, asked = out / "scores.jsonl", 0
    again = draws.replay(f"tests/test_score_killed.py -k {name}", 0)
    done, landed, seconds, slowest = {}, 0, whole.seconds, 0.0
    while landed < kills:
        before = changed(log)
        child = sdr.start(*words, prepare=FAST)
        if name != "SIGKILL" and landed % 2 == 0:  # the first thing that a run writes: from then on it handles signals
            wait_for_change(log, before)
            time.sleep(float(rng.uniform(0, 0.4)) * seconds)
        else:
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
        asked += ended.code == EXITS[name]
        if ended.code == EXITS[name] and name != "SIGKILL":
            assert "Traceback" not in "".join(ended.lines)
            assert ended.lines[-1].startswith("sdr score: interrupted")
            if "after" in ended.lines[-1]:  # else it had not begun to score
                assert ended.lines[-1].endswith(f"after {len(done)} of {VIDEOS} videos; the same command goes on")
                assert len(log.read_text().splitlines()) == len(done)
    assert slowest < 30
    assert asked >= kills // 2  # the others had not begun
    last = sdr.run(*words, prepare=FAST)
    assert last.code == 1, last.lines
    assert kept(out).items() >= done.items()
    assert score_runs.results(out) == whole.results, again
    assert list(out.rglob(".*")) == []
    record_property(f"runs of scoring ended by {name}", asked)


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
    assert f"note: {VIDEOS} of {VIDEOS} videos scored before: results are taken from" in capsys.readouterr().err
    assert score_runs.results(finished) == whole.results


@pytest.mark.parametrize(
    ("more", "again", "said"),
    [
        (["--threshold", "0.466", "--reduce", "max", "--batch_size", "1"], [], "results are taken from"),
        (["--allow_damaged", "true"], ["5.mp4"], "settings: allow_damaged was False, now True\n"),
        (["--seed", "3"], [], "results are taken from"),
        # may let the one without a score pass, and refuse the others
        (["--limits.max_frames", "9000"], ["5.mp4"], "settings: limits.max_frames was 4096, now 9000\n"),
        (["--limits.max_bytes", "1000"], EVERY, "settings: limits.max_bytes was 2147483648, now 1000\n"),
        (["--stride", "2"], EVERY, "stride was 4, now 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_other_settings_score_what_they_change(tmp_path, here, finished, monkeypatch, capsys, more, again, said):
    names = scored(monkeypatch)
    assert main([*here, *more]) == 1
    assert names == again
    assert said in capsys.readouterr().err
    states = {row["state"] for row in score_runs.results(finished)["table"]}
    expected = {"--threshold": {"fake", "real", "inconclusive"}, "--limits.max_bytes": {"inconclusive"}}
    assert states == expected.get(more[0], {"real", "inconclusive"})


def test_other_weights_score_all_again(tmp_path, here, finished, monkeypatch, capsys):
    names = scored(monkeypatch)
    other = score_runs.make_weights(tmp_path / "other.safetensors", seed=1)
    assert main([*here, "--weights", str(other)]) == 1
    assert len(names) == VIDEOS
    assert f"note: {VIDEOS} videos scored again, with other settings: weights was " in capsys.readouterr().err


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


def test_two_files_that_swap_names_are_scored_again(here, tmp_path, videos, monkeypatch):
    """Of one size and one time of change, as archives of one camera may be."""
    folder = tmp_path / "swapped"
    folder.mkdir()
    contents = [(videos / f"{n}.mp4").read_bytes() for n in range(2)]
    for n, content in enumerate(contents):
        path = folder / f"{n}.mp4"
        path.write_bytes(content + bytes(max(map(len, contents)) - len(content)))
        os.utime(path, (0, 0))
    here[1] = str(folder)
    main(here)
    before = score_runs.results(tmp_path / "out")["table"]
    os.rename(folder / "0.mp4", folder / "x")
    os.rename(folder / "1.mp4", folder / "0.mp4")
    os.rename(folder / "x", folder / "1.mp4")
    names = scored(monkeypatch)
    main(here)
    assert names == ["0.mp4", "1.mp4"]
    after = score_runs.results(tmp_path / "out")["table"]
    assert [row["score"] for row in after] == [row["score"] for row in reversed(before)]


def test_another_release_of_a_reader_tries_again_what_has_no_score(here, finished, monkeypatch, capsys):
    from importlib.metadata import version

    monkeypatch.setattr("sdr.score_run.version", lambda name: "99" if name == "av" else version(name))
    names = scored(monkeypatch)
    assert main(here) == 1
    assert names == ["5.mp4"]
    assert f"note: 1 video scored again, with other settings: av was {version('av')}, now 99" in capsys.readouterr().err


def test_weights_that_change_while_they_are_read_are_refused(here, tmp_path, weights, monkeypatch, capsys):
    import sdr.checkpoint

    load, copy = sdr.checkpoint.load_model, Path(shutil.copy(weights, tmp_path / "tiny.safetensors"))

    def change(path):
        loaded = load(path)
        score_runs.make_weights(path, seed=1)
        return loaded

    monkeypatch.setattr(sdr.checkpoint, "load_model", change)
    assert main([*here, "--weights", str(copy)]) == 2
    assert f"{copy}: changed while it was being read" in capsys.readouterr().err


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


def ends_by(number: int):
    """Decoding of 1.mp4 ends by a signal."""
    from sdr.decoding import Worker

    header = Worker.read_header

    def read_header(worker):
        if worker.path.name == "1.mp4":
            worker._process.send_signal(number)
            worker._process.wait()
            raise worker._death()
        return header(worker)

    return read_header


@pytest.mark.promise(row="isolation")
@pytest.mark.parametrize(("number", "again"), [(signal.SIGKILL, ["1.mp4"]), (signal.SIGSEGV, [])], ids=str)
def test_a_decoder_that_is_killed_is_one_video_and_is_tried_again(here, tmp_path, monkeypatch, whole, number, again):
    """The system kills for want of memory; where the decoder crashes, the file is at fault, and will be again."""
    with monkeypatch.context() as patch:
        patch.setattr("sdr.decoding.Worker.read_header", ends_by(number))
        assert main(here) == 1
    table = score_runs.results(tmp_path / "out")["table"]
    assert [row["reason"] for row in table[:3]] == ["", f"decoder process died (signal {number})", ""]
    names = scored(monkeypatch)
    assert main(here) == 1
    assert names == again
    assert (score_runs.results(tmp_path / "out") == whole.results) == bool(again)


@pytest.mark.promise(row="isolation")
def test_a_decoder_that_takes_too_long_is_tried_again(here, tmp_path, monkeypatch, whole):
    assert main([*here, "--limits.seconds", "0.000001"]) == 1
    table = score_runs.results(tmp_path / "out")["table"]
    assert all(row["reason"].startswith("not decoded within 1e-06 s") for row in table[:-1])
    names = scored(monkeypatch)
    assert main([*here, "--limits.seconds", "0.000001"]) == 1
    assert names == EVERY[:-1]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise(row="pre-emption")
def test_a_run_that_is_ended_writes_no_report(here, tmp_path, monkeypatch, capsys):
    from sdr.score_run import KeptScores

    def keep(self, video, *arguments):
        write(self, video, *arguments)
        if video.name == "2.mp4":
            os.kill(os.getpid(), signal.SIGTERM)

    write, before = KeptScores.keep, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(KeptScores, "keep", keep)
    monkeypatch.setattr("sdr.report.render_report", lambda *arguments: pytest.fail("there is no time for that"))
    assert main(here) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"sdr score: interrupted after 3 of {VIDEOS} videos; the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "out/scores.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 1 + 3
    assert not (tmp_path / "out/report.html").exists()


@pytest.mark.promise(row="pre-emption")
@pytest.mark.parametrize(
    ("where", "said"),
    [("recall", "interrupted; the same"), ("read", f"interrupted after {VIDEOS} of {VIDEOS} videos; the same")],
)
def test_reading_what_is_kept_ends_at_once(here, finished, whole, monkeypatch, capsys, where, said):
    from sdr.score_run import KeptScores

    def ended(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *arguments, **options)

    calls, call = [], getattr(KeptScores, where)
    monkeypatch.setattr(KeptScores, where, ended)
    assert main(here) == 143
    assert len(calls) == 2
    assert said in capsys.readouterr().err
    assert score_runs.results(finished) == whole.results  # as they were
    assert [path for path in finished.rglob(".*")] == []


def test_signals_are_handled_where_they_may_be(here, finished):
    """In the main thread; what a user has ignored, as nohup does, stays so."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(here)))
    thread.start()
    thread.join()
    assert codes == [1]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping() as stop:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop()
            assert signal.getsignal(signal.SIGUSR1) == stop.note
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_the_first_signal_interrupts_and_a_second_interrupt():
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.at_once():
        stop.note(signal.SIGTERM, None)
    assert stop.code == 143
    stop.interruptible = True
    with pytest.raises(KeyboardInterrupt):  # as in the last line of at_once
        stop.note(signal.SIGTERM, None)
    try:
        stop.note(signal.SIGTERM, None)  # where something may be half written
    except KeyboardInterrupt:
        pytest.fail("what ends was interrupted")
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT, None)
    assert stop.code == 143


def test_results_are_a_sequence(tmp_path, videos):
    from sdr.score import ScoreConfig, VideoScore
    from sdr.score_run import KeptScores, Results

    kept = KeptScores(tmp_path, ScoreConfig(), {})
    pairs = [(videos / name, None) for name in EVERY]
    for video, _ in pairs:
        kept.keep(video, None, VideoScore(str(video), None, "inconclusive"))
    results = Results(kept, pairs, pictures=True)
    assert [Path(result.path).name for result in results[1:3]] == EVERY[1:3]
    assert results[-1].path == results[-1:][0].path
