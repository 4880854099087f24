"""`sdr train` as a user types it: presets, files, refusals, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from clip_caches import make_cache
from train_runs import config, model, results

from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.cli import main
from sdr.model import SDRModel
from sdr.train_config import TRAIN_PRESETS, to_json

SMALL = ("--model.num_frames", "8", "--model.image_size", "16", "--model.width", "4", "--model.embed_dim", "16")
SMALL += ("--batch_size", "8", "--epochs", "2", "--log_every", "2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("command") / "cache"
    return str(make_cache(folder, real=12, fake=12, splits=("train", "val")))


def sdr(*words: str) -> int:
    """Exit code of a command line."""
    try:
        return main(list(words))
    except SystemExit as end:  # of the parser
        return end.code


def printed(capsys, *words: str) -> dict:
    """The configuration that --print_config gives for a command line."""
    assert sdr("train", *words, "--print_config") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    found["tpa"]["per_frame"] = sorted(found["tpa"]["per_frame"])  # a set, printed in an order of chance
    return {name: value for name, value in found.items() if name in to_json(TRAIN_PRESETS["tiny"]())}


@pytest.mark.parametrize("preset", TRAIN_PRESETS)
def test_a_preset_gives_every_setting(capsys, preset):
    assert printed(capsys, "--preset", preset) == to_json(TRAIN_PRESETS[preset]())
    assert printed(capsys, f"--preset={preset}", "--lr", "0.5") == to_json(TRAIN_PRESETS[preset]()) | {"lr": 0.5}


def test_tiny_is_the_preset_unless_one_is_named(capsys):
    assert printed(capsys) == to_json(TRAIN_PRESETS["tiny"]())


def test_a_file_names_a_preset_and_what_differs(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("preset: paper\nlr: 0.25\nmodel:\n  num_branches: 2\nloss:\n  mi: 0.5\n")
    expected = to_json(TRAIN_PRESETS["paper"]())
    expected |= {"lr": 0.25, "model": expected["model"] | {"num_branches": 2}, "loss": expected["loss"] | {"mi": 0.5}}
    assert printed(capsys, "--config", str(tmp_path / "mine.yaml")) == expected
    over = printed(capsys, "--config", str(tmp_path / "mine.yaml"), "--lr", "0.125", "--loss.mi", "0.75")
    assert (over["lr"], over["loss"]["mi"], over["model"]["num_branches"]) == (0.125, 0.75, 2)
    assert printed(capsys, "--lr", "0.125", "--loss.mi", "0.75", "--config", str(tmp_path / "mine.yaml")) == over
    assert printed(capsys, "--lr", "0.125", "--loss.mi", "0.75", f"--config={tmp_path / 'mine.yaml'}") == over


def test_what_is_printed_can_be_read_again(tmp_path, capsys):
    words = ("--preset", "paper", "--tpa.per_frame", "[flip,crop]", "--ema", "0.9", "--clip_norm", "1.0")
    assert sdr("train", *words, "--print_config") == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert printed(capsys, "--config", str(tmp_path / "printed.yaml")) == printed(capsys, *words)


@pytest.mark.parametrize(
    "text",
    ["lrr: 3\n", "model:\n  wdith: 3\n", "loss:\n  mi: much\n", "preset: huge\n", "preset: [tiny]\n", "[", "lr: -1\n"],
)
def test_a_wrong_file_is_refused_before_anything_is_made(tmp_path, cache, capsys, text):
    (tmp_path / "wrong.yaml").write_text(text)
    words = ("--config", str(tmp_path / "wrong.yaml"), "--data", cache, "--out", str(tmp_path / "run"))
    assert sdr("train", *words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert text.split(":")[0].strip("[\n") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.promise(row="no code from files")
@pytest.mark.parametrize(
    "text",
    [
        "model: evil.Foo\n",
        "model:\n  class_path: evil.Foo\n",
        "loss: {class_path: evil.Bar, init_args: {}}\n",
        "tpa: [evil.Foo]\n",
        "loader: other.yaml\n",
    ],
)
@pytest.mark.parametrize("command", [("train",), ("reproduce", "table1")], ids=str)
def test_a_file_runs_no_code_and_opens_no_other(tmp_path, cache, capsys, monkeypatch, command, text):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Foo: pass\nclass Bar: pass\n")
    (tmp_path / "wrong.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("readers: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert sdr(*command, "--config", "wrong.yaml", "--data", cache, "--out", str(tmp_path / "run")) == 2
    assert capsys.readouterr().err.startswith("sdr: wrong.yaml: ")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_trains_reports_and_says_where(tmp_path, cache, capsys):
    out = tmp_path / "run"
    assert sdr("train", "--data", cache, "--out", str(out), *SMALL) == 0
    said = capsys.readouterr().out
    assert f"weights: {out}/model.safetensors" in said
    assert "validation video AUC: " in said
    assert "nothing about real deepfakes" in said
    _, info = load_model(out / "model.safetensors")
    assert info.origin == "tiny with changes, trained on 24 synthetic matched-marginals videos, fakes by Flicker"
    assert "nothing about real deepfakes" in (out / "README.md").read_text()
    assert "<html" in (out / "report.html").read_text()
    again = ("train", "--data", cache, "--out", str(tmp_path / "again"), "--config", str(out / "config.json"))
    assert sdr(*again) == 0
    same = {name: data for name, data in results(out).items() if not name.startswith("result")}
    assert {name: data for name, data in results(tmp_path / "again").items() if name in same} == same


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SMALL, "--device", "gpu"), "--device: must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--preset", "paper"), "holds clips of 8 x 16 x 16 (the model takes those of sdr prepare --num_frames 32"),
        ((*SMALL, "--methods", "[Deepfakes]"), "has no clip of the method Deepfakes"),
        ((*SMALL, "--device", "cuda:99"), "--device: 'cuda:99' cannot be used"),
        ((*SMALL, "--init", "nowhere.safetensors"), "nowhere.safetensors: no such weights file"),
        ((*SMALL, "--accumulate", "3"), "batch_size must be a multiple of 6, got 8"),
    ],
)
def test_refusals_are_one_line(tmp_path, cache, capsys, words, said):
    assert sdr("train", "--data", cache, "--out", str(tmp_path / "run"), *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdr train: ")]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.promise(row="state")
def test_another_presets_run_and_weights_with_fewer_branches_are_named(tmp_path, cache, capsys):
    run = ("train", "--data", cache, "--out", str(tmp_path / "run"), *SMALL)
    assert sdr(*run) == 0
    assert sdr(*run, "--preset", "ftcn_released") == 2
    assert "was written with other settings: " in (said := capsys.readouterr().err)
    assert "model.num_heads was 4, now 16" in said
    save_weights(tmp_path / "two.safetensors", SDRModel(model(num_branches=2)), WeightsInfo())
    other = ("train", "--data", cache, "--out", str(tmp_path / "other"), *SMALL)
    assert sdr(*other, "--init", str(tmp_path / "two.safetensors")) == 2
    assert "two.safetensors: is of another model: num_branches is 2, the run asks for 4" in capsys.readouterr().err


def test_empty_split_and_one_class(tmp_path, capsys):
    test_only = make_cache(tmp_path / "test_only", splits=("test",))
    assert sdr("train", "--data", str(test_only), "--out", str(tmp_path / "run"), *SMALL) == 2
    assert "has no clip of the split 'train' (it has test)" in capsys.readouterr().err
    real_only = make_cache(tmp_path / "real_only", fake=0)
    assert sdr("train", "--data", str(real_only), "--out", str(tmp_path / "run"), *SMALL) == 2
    assert "has only real videos (training needs real and fake ones)" in capsys.readouterr().err


def test_persons_in_train_and_val_are_refused(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr("sdr.clip_cache.leaks", lambda *a: iter(["identity anna is in train (a) and val (b)"]))
    assert sdr("train", "--data", cache, "--out", str(tmp_path / "run"), *SMALL) == 2
    assert "identity anna is in train (a) and val (b) (its validation would say nothing)" in capsys.readouterr().err


@pytest.mark.promise(row="pre-emption")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, cache, name, code):
    out = tmp_path / "run"
    words = ["train", "--data", cache, "--out", str(out), *SMALL, "--epochs", "400", "--validate_every", "400"]
    command = [sys.executable, "-m", "sdr", *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "losses.csv", lines=5)
    child.send_signal(getattr(signal, name))
    began = time.monotonic()
    _, said = child.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert child.returncode == code
    assert "stopped after a checkpoint; the same command goes on from there" in said
    assert "Traceback" not in said
    (checkpoint,) = sorted((out / "checkpoints").iterdir())[-1:]
    logged = (out / "losses.csv").read_text().splitlines()
    assert checkpoint.name == f"step_{len(logged) - 1:09d}.safetensors"
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "losses.csv", lines=len(logged) + 3)
    child.kill()
    child.communicate()
    assert (out / "losses.csv").read_text().splitlines()[: len(logged)] == logged


def wait_for(path: Path, *, lines: int) -> None:
    """Until a text file has so many lines."""
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    pytest.fail(f"{path} did not grow")


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path, cache, capsys):
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert sdr("train", "--data", cache, "--out", str(out), *SMALL) == 2
    finally:
        os.close(descriptor)
    assert "another sdr train is writing there" in capsys.readouterr().err


def test_a_kept_configuration_repeats_the_run_with_its_preset_and_methods(tmp_path, capsys):
    several = make_cache(tmp_path / "cache", real=8, fake=8, splits=("train", "val"), methods=("Deepfakes", "FaceSwap"))
    one = ("train", "--data", str(several), "--out", str(tmp_path / "one"), *SMALL, "--methods", "[FaceSwap]")
    assert sdr(*one, "--seed", "3") == 0
    again = ("train", "--data", str(several), "--out", str(tmp_path / "two"))
    assert sdr(*again, "--config", str(tmp_path / "one/config.json")) == 0
    assert results(tmp_path / "two") == results(tmp_path / "one")
    capsys.readouterr()
    assert sdr(*one, "--seed", "3") == 0
    assert "the run was finished before: nothing was trained" in capsys.readouterr().err
    assert sdr(*one[:5], *SMALL, "--seed", "3") == 2
    assert "data was 16 clips of 16 videos, digest " in capsys.readouterr().err


def test_the_settings_are_kept_as_json(tmp_path, cache):
    out = tmp_path / "run"
    assert sdr("train", "--data", cache, "--out", str(out), *SMALL) == 0
    kept = json.loads((out / "config.json").read_text())
    assert (kept.pop("preset"), kept.pop("methods")) == ("tiny", None)
    expected = to_json(config(model=model(), epochs=2, log_every=2, checkpoint_every=500, warmup_epochs=None))
    assert kept == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--grouped.impl", "triton"), "grouped.impl 'triton' cannot run: no GPU"),
        (
            ("--grouped.impl", "cpu", "--model.spatial_kernel", "3"),
            "grouped.impl 'cpu' cannot run: the kernels",
        ),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_anything_is_written(
    cache, tmp_path, capsys, monkeypatch, words, reason
):
    monkeypatch.setattr("sdr.grouped.why_not", lambda impl, device: "no GPU")  # here they are interpreted
    out = tmp_path / "run"
    assert sdr("train", "--data", cache, "--out", str(out), *SMALL, "--implementation", "fast", *words) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
