"""The whole way of `sdr reproduce` on synthetic videos in the datasets' layouts: videos, clips, training, tables."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdr.checkpoint import load_model
from sdr.terminal import SYNTHETIC_NOTE

for package in ("pyarrow", "sklearn", "onnxruntime", "plotly", "jinja2", "jsonargparse", "rich", "av"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow

T, S = 8, 16
METHODS = ("ShiftJitter", "FullJitter")
# the smallest that has all parts: one stage of one block, and the temporal transformer
SIZES = {"num_frames": T, "image_size": S, "width": 2, "backbone_stages": 1, "embed_dim": 8, "num_heads": 1}
SIZES |= {"head_dim": 8, "mlp_dim": 8, "blocks": "[1]"}
TRAIN = ["--epochs=1", "--batch_size=4", "--device=cpu", *(f"--model.{name}={value}" for name, value in SIZES.items())]
DATASETS = {"ffpp": "FaceForensics++", "celebdf": "Celeb-DF-v2", "dfdc": "DFDC"}
ROWS = {  # first column and dataset of the lines that are ours
    "table1": [(method, "ffpp") for method in METHODS],
    "table2": [("SDR", "celebdf"), ("SDR", "dfdc")],
    "table3": [(row, layout) for row in ("FTCN", "+ TRFI", "+ TPA", "+ contrastive") for layout in ("celebdf", "dfdc")],
    "figure2": [(f"V = {V}", layout) for V in range(1, 7) for layout in ("celebdf", "dfdc", "ffpp")],
}


def sdr(*arguments) -> int:
    from sdr.cli import main

    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[Path]:
    """Clips of synthetic videos in each dataset's layout, in no order; of two of them only the test split."""
    root = tmp_path_factory.mktemp("synthetic")
    common = ["--identities=8", "--frames=16", "--size=64", "--crf=[23]", "--workers=1"]
    for layout, methods in {"dfdc": METHODS[1:], "ffpp": METHODS, "celebdf": METHODS[1:]}.items():
        chosen = f"--methods=[{','.join(methods)}]"
        assert sdr("synth", root / layout, f"--layout={layout}", chosen, *common) == 0
        cut = [f"--num_frames={T}", f"--size={S}", f"--stride={T}", "--min_frames=4", "--workers=1"]
        cut += [f"--cache={root / 'detections'}", *([] if layout == "ffpp" else ["--split=[test]"])]
        assert sdr("prepare", root / layout, f"--layout={layout}", f"--out={root / layout}_clips", *cut) == 0
    return [root / f"{layout}_clips" for layout in ("dfdc", "ffpp", "celebdf")]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reproduction") / "out"


def reproduce(experiment: str, caches: list[Path], out: Path, *more: str) -> dict:
    """Runs the command and reads what it has written."""
    assert sdr("reproduce", experiment, "--data", *caches, f"--out={out}", *TRAIN, *more) == 0
    return json.loads((out / f"{experiment}.json").read_text())


def weights(out: Path) -> dict[str, int]:
    """Every model and when it was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*/model.safetensors")}


@pytest.mark.parametrize(("experiment", "models"), {"table1": 2, "table2": 1, "table3": 3, "figure2": 5}.items())
def test_experiment(experiment, models, caches, out, capsys):
    before = weights(out)
    facts = reproduce(experiment, caches, out)
    printed = capsys.readouterr().out
    after = weights(out)
    assert len(after) - len(before) == models  # those that no earlier experiment has trained
    assert before.items() <= after.items()
    lines = [line for line in facts["lines"] if line["run"]]
    assert [(line["row"], line["dataset"]) for line in lines] == ROWS[experiment]
    for line in lines:
        assert line["real"] == line["fake"] / (
            len(METHODS) if (experiment, line["dataset"]) == ("figure2", "ffpp") else 1
        )
        low, high = line["video AUC low"], line["video AUC high"]
        assert 0 <= low <= line["video AUC"] <= high <= 100
        assert 0 <= line["video accuracy at the validation threshold"] <= 100
        assert line["difference video AUC"] is None
        assert load_model(out / "runs" / line["run"] / "model.safetensors")[1].synthetic
    page = (out / f"{experiment}.md").read_text()
    for text in (page, printed):
        assert SYNTHETIC_NOTE in text
        assert "The published figures are of the real datasets" in text
        assert "1 epoch, 4 clips an update" in text
    assert all(f"| {row} | {DATASETS[dataset]} |" in page for row, dataset in ROWS[experiment])
    assert (out / f"{experiment}.html").exists() == (experiment == "figure2")


def test_again_does_nothing_and_writes_the_same(caches, out):
    reproduce("table2", caches, out)
    before, table = weights(out), (out / "table2.json").read_bytes()
    reproduce("table2", list(reversed(caches)), out, "--log_every=3")
    assert weights(out) == before
    assert (out / "table2.json").read_bytes() == table.replace(b'"log_every": 50', b'"log_every": 3')


def test_figures_are_those_of_sdr_evaluate(caches, out, tmp_path):
    lines = [line for line in reproduce("table2", caches, out)["lines"] if line["run"]]
    model = out / "runs" / lines[0]["run"] / "model.safetensors"
    assert sdr("evaluate", model, *caches, f"--out={tmp_path / 'evaluation'}", "--device=cpu") == 0
    groups = json.loads((tmp_path / "evaluation/evaluation.json").read_text())["groups"]
    found = {group["dataset"]: group["metrics"] for group in groups if group["method"] == "all"}
    for line in lines:
        for name, value in found[line["dataset"]].items():
            assert line[name] == pytest.approx(100 * value)


def test_killed_in_the_middle_of_a_training_it_goes_on_to_the_same_figures(caches, tmp_path):
    more = ["--epochs=16", "--checkpoint_every=6", "--validate_every=16", "--deterministic=true"]
    whole = reproduce("table2", caches, tmp_path / "whole", *more)
    cut = ["reproduce", "table2", "--data", *map(str, caches), f"--out={tmp_path / 'cut'}", *TRAIN, *more]
    command = [sys.executable, "-c", "import sys; from sdr.cli import main; sys.exit(main())", *cut]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not list((tmp_path / "cut").glob("runs/*/checkpoints/step_*")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not list((tmp_path / "cut").glob("runs/*/model.safetensors"))
    assert reproduce("table2", caches, tmp_path / "cut", *more) == whole
