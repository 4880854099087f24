"""What a machine does to `sdr prepare`, `sdr train` and `sdr score`: one line, the right exit code, nothing lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import score_runs
import train_runs
from clip_caches import make_cache
from forked import Commands, Ended, commands, may_mount

DISK = pytest.mark.promise(row="disk full, read-only")
ODD = pytest.mark.promise(row="odd surroundings")
NAMES = ("prepare", "train", "score")
ODD_NAME = "a b \u00e9\u6f22\n'$(x)"
TEN_YEARS = 315_576_000  # seconds
TRAIN = ["--model.num_frames", 8, "--model.image_size", 16, "--model.width", 4, "--model.embed_dim", 16]
TRAIN += ["--batch_size", 8, "--epochs", 1, "--checkpoint_every", 1]


@pytest.fixture(scope="module")
def sdr(tmp_path_factory) -> Iterator[Commands]:
    with commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the commands read: three videos and their list, weights, a clip cache; all with times in the future."""
    folder = tmp_path_factory.mktemp("inputs") / "in"
    folder.mkdir()
    (folder / "videos").mkdir()
    for number in range(3):
        score_runs.make_video(folder / "videos" / f"{number}.mp4", number)
    (folder / "videos/list.csv").write_text("path,label,split\n" + "".join(f"{n}.mp4,0,train\n" for n in range(3)))
    score_runs.make_weights(folder / "tiny.safetensors")
    make_cache(folder / "clips", real=12, fake=12, splits=("train", "val"))
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + TEN_YEARS))
    return folder


def prepared(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


class Case(NamedTuple):
    """A command on the inputs of one folder: its words but for --out and --cache, what it reads, and its results."""

    words: list[object]
    read: Path
    results: Callable[[Path], dict]
    prepare: list[tuple[str, ...]]


def case_of(name: str, folder: Path) -> Case:
    stub = ("stub_detector",)
    if name == "train":
        words = ["train", "--data", folder / "clips", *TRAIN]
        return Case(words, folder / "clips/shards/train/003.tar", train_runs.results, [])
    second = folder / "videos/1.mp4"
    small = ["--stride", 4, "--min_frames", 4]
    if name == "score":
        words = ["score", folder / "videos", "--weights", folder / "tiny.safetensors", *small]
        return Case(words, second, score_runs.results, [stub])
    words = ["prepare", folder / "videos/list.csv", "--layout", "csv", "--num_frames", 8, "--size", 32, *small]
    return Case([*words, "--workers", 1], second, prepared, [stub, ("fork_workers",)])


@pytest.fixture(params=NAMES)
def case(request, inputs) -> Case:
    return case_of(request.param, inputs)


class Whole(NamedTuple):
    """A run that nothing happened to: its folder, which holds "out" and "cache", and its results."""

    folder: Path
    results: dict


WHOLE: dict[str, Whole] = {}


@pytest.fixture
def go(sdr, case, tmp_path, tmp_path_factory) -> Callable[..., Ended]:
    """Runs the command with some preparations; ``tmp_path / "out"`` is its folder unless another is named."""

    def run(*prepare, folder: Path = tmp_path, out: Path | None = None, case: Case = case, start: bool = False):
        more = ["--out", out or folder / "out"]
        if case.words[0] != "train":
            more += ["--cache", folder / "cache"]
        call = sdr.start if start else sdr.run
        return call(*case.words, *more, prepare=[*case.prepare, *prepare], folder=tmp_path)

    if case.words[0] not in WHOLE:
        folder = tmp_path_factory.mktemp("whole")
        ended = run(folder=folder)
        assert ended.code == 0, ended.lines
        WHOLE[case.words[0]] = Whole(folder, case.results(folder / "out"))
    return run


def one_line(ended: Ended, case: Case, code: int = 2) -> str:
    """The line that a failure prints."""
    assert ended.code == code, ended.lines
    assert "Traceback" not in "".join(ended.lines)
    (line,) = [line for line in ended.lines if line.startswith(f"sdr {case.words[0]}: ")]
    return line


def is_whole(case: Case, out: Path) -> bool:
    """Whether a run's results are those of one that nothing happened to."""
    return case.results(out) == WHOLE[case.words[0]].results


def goes_on(go, case: Case, tmp_path: Path) -> None:
    """The same command ends well, as if nothing had been."""
    ended = go()
    assert ended.code == 0, ended.lines
    assert is_whole(case, tmp_path / "out")
    assert not [path for path in tmp_path.rglob(".*.tmp")]


# --- the disk --------------------------------------------------------------------------------------------------------


@DISK
def test_a_full_disk_is_one_line_and_the_run_goes_on(go, case, tmp_path):
    assert "cannot be written: File too large" in one_line(go(("largest_file", 10_000)), case)
    goes_on(go, case, tmp_path)


@DISK
def test_a_read_only_disk_is_one_line_and_leaves_what_is_there(go, case, tmp_path):
    if not may_mount():
        pytest.skip("this machine lets no process make mounts of its own")
    ended = go(("die", 3))
    assert ended.code in (-9, 2)
    before = prepared(tmp_path / "out")
    assert "Read-only file system" in one_line(go(("read_only", tmp_path / "out")), case)
    assert prepared(tmp_path / "out") == before
    home = tmp_path / "home"
    home.mkdir()
    assert "cannot be made: Read-only file system" in one_line(go(("read_only", home), out=home / "out"), case)
    goes_on(go, case, tmp_path)


@DISK
@pytest.mark.parametrize("case", ["prepare", "score"], indirect=True)
def test_detections_that_cannot_be_kept_are_a_warning(go, case, tmp_path):
    if not may_mount():
        pytest.skip("this machine lets no process make mounts of its own")
    (tmp_path / "cache").mkdir()
    ended = go(("read_only", tmp_path / "cache"))
    assert ended.code == 0
    assert len([line for line in ended.lines if "cannot be written: Read-only file system" in line]) == 1
    assert is_whole(case, tmp_path / "out")


# --- surroundings ----------------------------------------------------------------------------------------------------


@ODD
def test_input_that_vanishes_is_named(go, case, inputs, tmp_path):
    folder = Path(shutil.copytree(inputs, tmp_path / "in"))
    moved = case_of(case.words[0], folder)
    written = {"prepare": ".tar", "train": ".json", "score": ".npz"}[case.words[0]]
    ended = go(("vanish", moved.read, written), case=moved)
    if case.words[0] == "score":  # one video without a score
        assert ended.code == 1
        assert [line for line in ended.lines if line.startswith("inconclusive ") and str(moved.read) in line]
    else:
        assert str(moved.read) in one_line(ended, case)
    shutil.copy2(inputs / moved.read.relative_to(folder), moved.read)
    ended = go(case=moved)
    assert ended.code == 0, ended.lines
    assert case.words[0] == "score" or is_whole(case, tmp_path / "out")  # a score's path names the folder


@ODD
def test_a_clock_that_is_set_back_changes_nothing(go, case, tmp_path):
    """A run is killed in a far future and goes on today."""
    assert go(("clock", TEN_YEARS), ("die", 3)).code in (-9, 2)
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + TEN_YEARS))
    ended = go(("clock", -TEN_YEARS))
    assert ended.code == 0, ended.lines
    assert is_whole(case, tmp_path / "out")


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def damage(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@ODD
@pytest.mark.parametrize("case", ["prepare", "score"], indirect=True)
def test_damaged_detections_are_told_and_made_again(go, case, tmp_path):
    shutil.copytree(WHOLE[case.words[0]].folder / "cache", tmp_path / "cache")
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == 3
    for entry in entries:
        damage(entry)
    ended = go()
    assert ended.code == 0, ended.lines
    assert len([line for line in ended.lines if "is damaged, faces are detected again" in line]) == 3
    assert is_whole(case, tmp_path / "out")
    assert prepared(tmp_path / "cache") == prepared(WHOLE[case.words[0]].folder / "cache")


@ODD
@pytest.mark.promise(row="no code from files")
@pytest.mark.parametrize("case", ["score"], indirect=True)
@pytest.mark.parametrize("how", ["another's", "cut off", "empty", "of pickles"])
def test_damaged_results_are_told_and_made_again(go, case, tmp_path, how):
    shutil.copytree(WHOLE["score"].folder / "out", tmp_path / "out")
    path = sorted((tmp_path / "out/kept").iterdir())[1]
    if how == "another's":
        with np.load(path) as file:
            told = file["result"].tobytes().replace(b'"faces": 1', b'"faces": 2')
            np.savez(path, **{**file, "result": np.frombuffer(told, np.uint8)})
    elif how == "of pickles":
        np.savez(path, result=np.array([Evil(tmp_path / "code")]), pictures=0, sha256=0)
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size // 2)
    ended = go()
    (line,) = [line for line in ended.lines if "is damaged, the video is scored again" in line]
    assert str(path) in line
    assert not (tmp_path / "code").exists()
    assert any(line.startswith("note: 2 of 3 videos scored before: ") for line in ended.lines)
    assert is_whole(case, tmp_path / "out")


@ODD
@pytest.mark.parametrize("case", ["score"], indirect=True)
@pytest.mark.parametrize("how", ["flipped", "another's"])
def test_damaged_pictures_are_one_line_and_made_again(go, case, tmp_path, how):
    """They are read for the report alone."""
    shutil.copytree(WHOLE["score"].folder / "out", tmp_path / "out")
    path = sorted((tmp_path / "out/kept").iterdir())[1]
    if how == "flipped":
        damage(path)
    else:
        with np.load(path) as file:
            np.savez(path, **{**file, "pictures": file["pictures"] ^ 1})
    line = one_line(go(), case)
    assert f"{path}: is damaged: " in line
    assert line.endswith("(the same command scores the video again)")
    goes_on(go, case, tmp_path)


@DISK
@pytest.mark.parametrize("case", ["score"], indirect=True)
@pytest.mark.parametrize("how", ["a file", "a folder in a result's place", "read-only"])
def test_results_that_cannot_be_kept_are_one_line_before_any_is_scored(go, case, tmp_path, how):
    shutil.copytree(WHOLE["score"].folder / "out", tmp_path / "out")
    kept, prepare = tmp_path / "out/kept", []
    path = sorted(kept.iterdir())[1]
    path.unlink()
    if how == "a file":
        shutil.rmtree(kept)
        kept.write_text("")
        said = "/out/kept: cannot be made: File exists"
    elif how == "read-only":
        if not may_mount():
            pytest.skip("this machine lets no process make mounts of its own")
        prepare = [("read_only", kept)]
        said = "/out/kept: cannot be used: Read-only file system"
    else:
        path.mkdir()
        said = ".npz: cannot be read: Is a directory"
    ended = go(*prepare)
    assert one_line(ended, case).endswith(said)
    assert not [line for line in ended.lines if line.startswith(("real ", "fake "))]


@ODD
@pytest.mark.parametrize("case", ["train"], indirect=True)
def test_a_damaged_clip_cache_is_refused_by_name(go, case, inputs, tmp_path):
    folder = Path(shutil.copytree(inputs, tmp_path / "in"))
    for name in ("manifest.parquet", "prepare.json", "shards/train/003.tar"):
        path = folder / "clips" / name
        os.truncate(path, path.stat().st_size // 2)
        assert str(path) in one_line(go(case=case_of("train", folder)), case)
        shutil.copy2(inputs / "clips" / name, path)
    ended = go(case=case_of("train", folder))
    assert ended.code == 0, ended.lines
    assert is_whole(case, tmp_path / "out")


@ODD
def test_two_at_once_share_a_cache(go, case, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    children = [go(out=out, start=True) for out in outs]
    for child, out in zip(children, outs, strict=True):
        ended = child.wait()
        assert ended.code == 0, ended.lines
        assert is_whole(case, out)


@ODD
@pytest.mark.parametrize("case", ["score"], indirect=True)
def test_two_at_once_in_one_folder_are_refused(go, case, tmp_path):
    import fcntl

    shutil.copytree(WHOLE["score"].folder / "out", tmp_path / "out")
    before = prepared(tmp_path / "out")
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert one_line(go(), case).endswith(
            "another sdr score is writing there (wait for it to end, or choose another folder)"
        )
    finally:
        os.close(descriptor)
    assert prepared(tmp_path / "out") == before


@ODD
def test_without_a_home(sdr, go, case, tmp_path):
    """An unknown user without HOME has no cache folder."""
    unset = [("environment", name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME")]
    prepare = [*case.prepare, *unset, ("unknown_user",)]
    ended = sdr.run(*case.words, "--out", tmp_path / "out", prepare=prepare, folder=tmp_path)
    assert ended.code == 0, ended.lines
    assert is_whole(case, tmp_path / "out")
    if case.words[0] == "score":
        assert any("there is no home folder, detections are not kept" in line for line in ended.lines)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}  # and no folder that is called ~


@ODD
def test_odd_names_in_the_c_locale(inputs, tmp_path):
    """Spaces, quotes, a line break and letters that the locale has not; nothing that is printed fails."""
    folder = Path(shutil.copytree(inputs, tmp_path / ODD_NAME))
    shutil.copy(folder / "videos/1.mp4", folder / f"videos/{ODD_NAME}.mp4")  # a text names none of them
    words: list[str] = []
    for name in NAMES:
        more = [] if name == "train" else ["--cache", folder / "cache"]
        words += ["next", *map(str, [*case_of(name, folder).words, "--out", folder / name, *more])]
    code = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
import forked
from sdr.cli import main
forked.stub_detector()
forked.fork_workers()
print(sys.getfilesystemencoding(), sys.stdout.encoding)
print([main(list(job)) for next, job in itertools.groupby(sys.argv[2:], "next".__eq__) if not next])
"""
    unset = {name: value for name, value in os.environ.items() if name not in ("LANG", "PYTHONIOENCODING", "LC_CTYPE")}
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent, *words],
        capture_output=True,
        env=unset | locale,
        check=False,
    )
    printed = done.stdout.decode("ascii")
    assert printed.startswith("ascii ascii\n") or printed.startswith("utf-8 ascii\n")
    assert done.returncode == 0, done.stderr.decode("ascii", "backslashreplace")
    assert printed.splitlines()[-1] == "[0, 0, 0]", done.stderr.decode("ascii", "backslashreplace")
    assert b"Traceback" not in done.stderr
    rows = score_runs.results(folder / "score")["table"]
    assert [row["state"] for row in rows] == ["real"] * 4
    assert len(prepared(folder / "prepare")) == len(["prepare.json", "manifest.parquet", "unusable.csv"]) + 3
