"""Two processes over gloo train like one process on the joint batch."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip_caches import make_cache
from train_runs import config, model, results

from sdr.checkpoint import load_model
from sdr.clip_cache import ClipCache
from sdr.errors import SDRError
from sdr.train import train

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("distributed_runs.py")


SCHEMES = ("gram", "fused")


def grouped(scheme: str) -> dict:
    """Settings of the fast model's training."""
    return {"implementation": "fast", "grouped": {"scheme": scheme, "impl": "cpu"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """An odd number of validation clips: the shares of two processes are not equal."""
    return make_cache(tmp_path_factory.mktemp("distributed") / "cache", real=12, fake=11, splits=("train", "val"))


@pytest.fixture(scope="module")
def joint(tmp_path_factory, cache) -> Path:
    """A run by one process."""
    out = tmp_path_factory.mktemp("joint") / "run"
    train(
        config(model=model(dropout=0.0), ema=0.5), ClipCache(cache, split="train"), ClipCache(cache, split="val"), out
    )
    return out


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def runs(request, tmp_path_factory, cache) -> tuple[Path, dict[str, list[str]]]:
    """Runs by two processes, and what each rank said of them, in order."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "taken").mkdir()
    (folder / "taken/precious").touch()
    synchronised = {"strategy": request.param, "bn": "sync"}
    jobs = [
        ("joint", {**synchronised, "clip_norm": 1e6}, 0, 0),
        ("whole", {"strategy": request.param, "recompute": True, "accumulate": 2}, 0, 0),
        ("stopped", {"strategy": request.param, "recompute": True, "accumulate": 2}, 3, 0),  # a validation is due
        ("stopped", {"strategy": request.param, "recompute": True, "accumulate": 2}, 4, 0),  # in the validation
        ("stopped", {"strategy": request.param, "recompute": True, "accumulate": 2}, 0, 0),
        ("skipping", {**synchronised}, 0, 5),
        ("joint", {**synchronised, "clip_norm": 1e6}, 0, 0),
        ("odd", {"batch_size": 6}, 0, 0),
        ("taken", {}, 0, 0),
    ]
    if request.param == "ddp":
        jobs += [(s, {**synchronised, "clip_norm": 1e6, **grouped(s)}, 0, 0) for s in SCHEMES]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [str(cache), str(folder), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = {"0": [], "1": []}
    for line in done.stdout.splitlines():
        rank, _, text = line.partition(" ")
        said[rank].append(text)
    assert said["0"] == said["1"]
    return folder, said["0"]


def table(path: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(path.read_text().splitlines())]


def flat_weights(path: Path) -> torch.Tensor:
    state = load_model(path / "last.safetensors")[0].state_dict()
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


def test_train_like_one_on_the_joint_batch(runs, joint):
    folder, said = runs
    assert said[0] == said[6] == "joint finished"
    for name in ("losses.csv", "validation.csv"):
        for row, expected in zip(table(folder / "joint" / name), table(joint / name), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found, expected = flat_weights(folder / "joint"), flat_weights(joint)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_grouped_branches_train_like_one_on_the_joint_batch(runs, joint, scheme):
    folder, said = runs
    if folder.name.startswith("fsdp"):
        assert not (folder / scheme).exists()  # it keeps no whole weights for the kernels to read
        return
    assert f"{scheme} finished" in said
    for row, expected in zip(table(folder / scheme / "losses.csv"), table(joint / "losses.csv"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    found, expected = flat_weights(folder / scheme), flat_weights(joint)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_stop_on_one_process_stops_both_and_they_go_on_bit_for_bit(runs):
    folder, said = runs
    assert said[1:5] == ["whole finished", "stopped stopped", "stopped stopped", "stopped finished"]
    assert results(folder / "stopped") == results(folder / "whole")


def test_batch_norms_of_each_process_see_its_own_clips(runs, joint):
    folder, _ = runs
    rows, expected = table(folder / "whole/losses.csv"), table(joint / "losses.csv")
    assert rows[0]["total"] != pytest.approx(expected[0]["total"], rel=1e-3)
    assert rows[-1]["total"] < rows[0]["total"]


def test_an_update_that_is_not_finite_on_one_process_is_skipped_by_both(runs):
    folder, said = runs
    assert said[5] == "skipping finished"
    rows = table(folder / "skipping/losses.csv")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1] + [0] * 7
    for row, expected in zip(rows[:4], table(folder / "joint/losses.csv"), strict=False):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_does_not_fit_is_refused_in_one_line_by_every_process(runs, cache):
    folder, said = runs
    assert said[7] == "odd refused: options: batch_size must be a multiple of 4 for 2 processes, got 6"
    assert said[8].startswith(f"taken refused: {folder}/taken: is not empty and was not written by sdr train")
    caches = [ClipCache(cache, split=split) for split in ("train", "val")]
    fields = json.loads((folder / "whole/config.json").read_text())
    settings = config(model=model(dropout=0.0), ema=0.5, strategy=fields["strategy"], recompute=True, accumulate=2)
    assert train(settings, *caches, folder / "whole").finished  # where it is done, the number says nothing
    (folder / "whole/result.json").unlink()
    with pytest.raises(SDRError, match=r"whole: was written with other settings: processes was 2, now 1 \("):
        train(settings, *caches, folder / "whole")
