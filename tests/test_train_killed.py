"""A run that is killed or asked to stop, at any moment and any number of times, ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clip_caches import make_cache
from kill_runs import CONFIG
from train_runs import results

from sdr.clip_cache import ClipCache
from sdr.train import train

KILLS = int(os.environ.get("SDR_KILLS", 10))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("killed") / "cache", real=12, fake=12, splits=("train", "val"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(CONFIG, ClipCache(cache, split="train"), ClipCache(cache, split="val"), out).finished
    return results(out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", "-9"), ("SIGTERM", "143"), ("SIGUSR1", "143")])
def test_killed_runs_end_like_one_that_was_not(tmp_path, cache, whole, name, code):
    seed = os.environ.get("SDR_KILL_SEED", "0")
    kills = KILLS if name == "SIGKILL" else max(1, KILLS // 3)
    arguments = [cache, tmp_path / "run", name, kills, seed]
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)
    print("SDR_KILL_SEED", seed)
    assert done.returncode == 0, done.stderr
    ended = [line.split() for line in done.stdout.splitlines()]
    assert len([how for how, _ in ended if how == code]) >= kills // 2  # the others had come to the end, or not begun
    assert max(float(seconds) for how, seconds in ended if how == code) < 30
    assert results(tmp_path / "run") == whole
    assert sorted(path.name for path in (tmp_path / "run").rglob(".*")) == []
