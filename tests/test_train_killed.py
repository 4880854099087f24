"""A run that is killed or asked to stop, at any moment and any number of times, ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import draws
import pytest
from clip_caches import make_cache
from kill_runs import CONFIG
from train_runs import results

from sdr.clip_cache import ClipCache
from sdr.train import train


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("killed") / "cache", real=12, fake=12, splits=("train", "val"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(CONFIG, ClipCache(cache, split="train"), ClipCache(cache, split="val"), out).finished
    return results(out)


@pytest.mark.slow
@pytest.mark.promise(row="kill -9")
@pytest.mark.promise(row="pre-emption")
@pytest.mark.promise(row="atomic")
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", "-9"), ("SIGTERM", "143"), ("SIGUSR1", "143")])
def test_killed_runs_end_like_one_that_was_not(tmp_path, cache, whole, name, code, record_property):
    kills = draws.KILLS if name == "SIGKILL" else max(1, draws.KILLS // 3)
    arguments = [cache, tmp_path / "run", name, kills]
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)
    again = draws.replay(f"tests/test_train_killed.py -k {name}", 0)
    assert done.returncode == 0, f"{done.stderr}\n{again}"
    ended = [line.split() for line in done.stdout.splitlines()]
    record_property(f"runs of training ended by {name}", len([how for how, _ in ended if how == code]))
    assert len([how for how, _ in ended if how == code]) >= kills // 2  # the others had come to the end, or not begun
    assert max(float(seconds) for how, seconds in ended if how == code) < 30
    assert results(tmp_path / "run") == whole, again
    assert sorted(path.name for path in (tmp_path / "run").rglob(".*")) == []
