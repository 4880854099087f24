"""The acceptance test: `make demo` as a new user runs it, and its control that cannot see time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    """Standard output; a failure shows what was printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def video_auc(printed: str) -> float:
    return float(re.search(r"^video AUC: ([\d.]+)$", printed, re.MULTILINE).group(1))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, run("make", "demo", f"VENV={sys.prefix}", f"DEMO={folder}")


def test_demo_tells_held_out_real_from_fake(demo):
    folder, printed = demo
    assert video_auc(printed) >= 0.9
    assert f"report: {folder}/report/report.html" in printed
    assert "A synthetic AUC shows that the pipeline works and nothing about real deepfakes." in printed
    page = (folder / "report/report.html").read_text()
    assert "nothing about real deepfakes" in page
    results = [json.loads(line) for line in (folder / "report/scores.jsonl").read_text().splitlines()]
    assert {result["truth"] for result in results} == {0, 1}
    assert all(result["state"] in ("real", "fake") for result in results)


def test_control_without_temporal_kernels_is_at_chance(demo):
    """Same videos, same training, kernels of 1 in time: what is left of the score is chance."""
    printed = run("make", "control", f"VENV={sys.prefix}", f"DEMO={demo[0]}")
    assert 0.35 <= video_auc(printed) <= 0.65
