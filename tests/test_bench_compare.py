"""The comparison of two trees: its statistics against closed forms and simulated runs, and whole comparisons."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("pytest_benchmark")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return import_module


# ---------------------------------------------------------------- statistics


def test_interval_is_the_binomials(bench):
    interval, least = bench("compare_trees").interval, bench("compare_trees").least_pairs
    ratios = list(range(1, 11))
    # of ten fair coins: none 1/1024, at most one 11/1024, at most two 56/1024
    for alpha, expected in [(0.002, (1, 10)), (0.0214, (1, 10)), (0.0215, (2, 9)), (0.1093, (2, 9)), (0.11, (3, 8))]:
        assert interval(ratios[::-1], alpha) == expected
    assert [least(alpha) for alpha in (1.0, 0.5, 0.05, 2 / 1024)] == [1, 2, 6, 10]
    for alpha in (0.5, 0.05, 0.05 / 100):
        interval(range(least(alpha)), alpha)
        with pytest.raises(ValueError, match="must be at least"):
            interval(range(least(alpha) - 1), alpha)


@pytest.mark.parametrize("draw", ["lognormal", "standard_cauchy"])
def test_interval_holds_the_median_as_often_as_it_says(bench, draw):
    interval, rng = bench("compare_trees").interval, np.random.default_rng(0)
    runs, n, k = 4000, 40, 14  # P(binomial(40, 1/2) < 14) = 0.0192, < 15 already 0.0403
    outside = 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    median = {"lognormal": 1.0, "standard_cauchy": 0.0}[draw]
    intervals = [interval(ratios, 0.05) for ratios in getattr(rng, draw)(size=(runs, n))]
    missed = sum(not low <= median <= high for low, high in intervals)
    assert missed / runs == pytest.approx(outside, abs=4 * math.sqrt(outside / runs))


def simulated(rng, pairs: int, slow_down: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both sides on a machine whose speed wanders, with bursts that hit single rounds."""
    wander = np.exp(np.cumsum(rng.normal(0, 0.05, pairs)))
    times = rng.lognormal(0, 0.1, (2, pairs)) * wander * 1e-3
    times[rng.random(times.shape) < 0.1] *= 5
    return times[0], slow_down * times[1]


def test_nothing_changed_is_no_regression_and_twice_the_time_always_is(bench):
    judge, rng = bench("compare_trees").judge, np.random.default_rng(0)
    verdicts = [judge(*simulated(rng, 40, 1.0), 0.05 / 20, 0.05)["verdict"] for _ in range(1000)]
    assert verdicts.count("slower") + verdicts.count("faster") <= 2
    assert all(judge(*simulated(rng, 40, 2.0), 0.05 / 20, 0.05)["verdict"] == "slower" for _ in range(1000))
    assert all(judge(*simulated(rng, 40, 0.5), 0.05 / 20, 0.05)["verdict"] == "faster" for _ in range(1000))


def test_verdict_is_by_the_interval_and_the_tolerance(bench):
    judge = bench("compare_trees").judge
    base = [1.0] * 10
    assert judge(base, [1.06] * 10, 0.05, 0.05)["verdict"] == "slower"
    assert judge(base, [1.04] * 10, 0.05, 0.05)["verdict"] == "same within 4 %"
    assert judge(base, [0.97] * 10, 0.05, 0.05)["verdict"] == "same within 4 %"  # 1 / 0.97 = 1.031
    assert judge(base, [0.9] * 10, 0.05, 0.05)["verdict"] == "faster"
    wide = judge(base, [0.5, 1.04] + [1.5] * 8, 0.03, 0.05)  # the second smallest is not above
    assert (wide["low"], wide["high"], wide["ratio"], wide["verdict"]) == (1.04, 1.5, 1.5, "same within 50 %")


# ---------------------------------------------------------------- turns


def test_without_a_comparison_a_turn_is_always_there(bench, monkeypatch):
    turns = bench("turns")
    monkeypatch.delenv(turns.VARIABLE, raising=False)
    assert turns.take_turn() is None
    assert turns.fixed_rounds() is None


def test_a_turn_ends_with_the_comparison(bench, monkeypatch):
    turns = bench("turns")
    (may, grant), (asked, ask) = os.pipe(), os.pipe()
    monkeypatch.setenv(turns.VARIABLE, f"{may},{ask},7")
    assert turns.fixed_rounds() == 7
    os.write(grant, b"g")
    turns.take_turn()
    assert set(json.loads(os.read(asked, 1000))) == {"sdr", "sdr_kernels"}
    os.close(grant)
    with pytest.raises(RuntimeError, match="the comparison ended"):
        turns.take_turn()
    for descriptor in (may, asked, ask):
        os.close(descriptor)


# ---------------------------------------------------------------- whole comparisons of a small stand-in

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true")
"""
WORK = """
def work():
    return sum(range(20_000))
"""
SETTINGS = """
[pytest]
python_files = bench_*.py
python_functions = bench_*
addopts = -ra
filterwarnings = error
"""
BENCHMARKS = """
import time
from pathlib import Path

import pytest
import sdr, sdr_kernels, turns


def timed(benchmark, call):
    assert call() == sum(range(20_000)), "a wrong answer"
    benchmark.pedantic(call, setup=turns.take_turn, rounds=turns.fixed_rounds() or 1)


def bench_work(benchmark):
    timed(benchmark, sdr_kernels.work)


def bench_other(benchmark):
    timed(benchmark, lambda: sum(range(20_000)))


def bench_absent(benchmark):
    pytest.skip("needs a GPU")


def bench_long(benchmark):
    benchmark.pedantic(time.sleep, (1.5,), setup=turns.take_turn, rounds=turns.fixed_rounds() or 1)


def bench_log(benchmark):
    log = Path(__file__).parents[2] / "log"

    def say():
        with log.open("a") as file:
            file.write(Path(__file__).parents[1].name + "\\n")

    benchmark.pedantic(say, setup=turns.take_turn, rounds=turns.fixed_rounds() or 1)
"""


def stand_in(tree: Path, work: str = WORK) -> Path:
    """A tree that the command can compare: its own modules, two packages of one function, and benchmarks."""
    for name in ("sdr", "sdr_kernels", "bench"):
        (tree / name).mkdir(parents=True)
    (tree / "sdr" / "__init__.py").touch()
    (tree / "sdr_kernels" / "__init__.py").write_text(work)
    for name in ("compare_trees", "referee", "turns", "ledger", "wording", "rows", "summary"):
        shutil.copy(ROOT / "bench" / f"{name}.py", tree / "bench")
    (tree / "bench" / "conftest.py").write_text(CONFTEST)
    (tree / "bench" / "bench_all.py").write_text(BENCHMARKS)
    (tree / "pytest.ini").write_text(SETTINGS)
    return tree


def command(tree: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(tree / "bench" / "compare_trees.py"), *arguments]


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # of the command itself: its processes get their tree's
    return subprocess.run(command(tree, *arguments), capture_output=True, text=True, check=False, env=env)


def test_twice_the_work_is_named_and_nothing_else(tmp_path):
    base = stand_in(tmp_path / "base")
    slow = stand_in(tmp_path / "slow", WORK.replace("return", "sum(range(20_000))\n    return"))
    report = tmp_path / "report.json"
    choice = ["-k", "work or absent", "--tolerance", "0.4", "--json", str(report)]
    done = run(slow, "--base", str(base), *choice)
    assert done.returncode == 1, done.stdout + done.stderr
    ending = done.stdout.splitlines()[-1]
    assert ending == "slower by more than 40 %: bench/bench_all.py::bench_work; failed: none"
    found = json.loads(report.read_text())
    row = found["rows"]["bench/bench_all.py::bench_work"]
    assert (row["verdict"], found["rounds"]) == ("slower", 40)
    assert 1.4 < row["low"] <= row["ratio"] <= row["high"]
    assert found["not_compared"] == {"bench/bench_all.py::bench_absent": "base: needs a GPU"}
    assert "not compared: base: needs a GPU" in done.stdout


def test_a_wrong_answer_is_an_error_that_is_named(tmp_path):
    base = stand_in(tmp_path / "base")
    wrong = stand_in(tmp_path / "wrong", WORK.replace("20_000", "19_999"))
    done = run(wrong, "--base", str(base), "-k", "work or other", "--tolerance", "0.4")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "bench_all.py::bench_work   FAILED in new: AssertionError: a wrong answer" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("failed: bench/bench_all.py::bench_work")
    assert "bench_other" in done.stdout  # and the rest is compared all the same


def test_rounds_alternate_strictly(tmp_path):
    base, new = stand_in(tmp_path / "base"), stand_in(tmp_path / "new")
    run(new, "--base", str(base), "-k", "log", "--rounds", "10")
    order = (tmp_path / "log").read_text().split()
    assert order == ["base", "new", "new", "base"] * 5


def test_long_rounds_and_new_benchmarks_are_named_not_judged(tmp_path):
    base, new = stand_in(tmp_path / "base"), stand_in(tmp_path / "new")
    with (new / "bench" / "bench_all.py").open("a") as file:
        file.write("\n\ndef bench_new(benchmark):\n    timed(benchmark, sdr_kernels.work)\n")
    done = run(new, "--base", str(base), "-k", "long or new")
    assert done.returncode == 2  # nothing was compared at all
    assert re.search(r"bench_long  not compared: a round takes \d\.\d s, more than --longest 1", done.stdout)
    assert "bench_new   not compared: base does not have it" in done.stdout


def test_another_trees_code_is_never_timed(tmp_path):
    base, new = stand_in(tmp_path / "base"), stand_in(tmp_path / "new")
    (new / "bench" / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(base)!r})\n{CONFTEST}")
    done = run(new, "--base", str(base), "-k", "work")
    assert done.returncode == 2
    assert f"FAILED in new: imported sdr from {base}/sdr, not from {new}/sdr" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--base", "nowhere"], "make compare: 'nowhere' is neither a folder nor a commit of this repository"),
        (["--base", "OLD"], "make compare: OLD has no bench/turns.py: it is older than this command"),
        (["--base", "NEW", "-k", "nothing"], "make compare: no benchmark matches"),
        (
            ["--base", "NEW", "--benchmarks", "bench/no.py"],
            "make compare: bench/no.py is not in ",
        ),
        (
            ["--base", "NEW", "-k", "work", "--rounds", "4"],
            "make compare: --rounds must be at least 6 for 1 benchmarks, got 4",
        ),
        (["--base", "NEW", "--rounds", "7"], "make compare: --rounds must be even, got 7"),
        (["--base", "NEW", "--json", "/nonexistent/a.json"], "make compare: --json must lie in a folder that can"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_in_one_line(tmp_path, arguments, line):
    new = stand_in(tmp_path / "new")
    (tmp_path / "old" / "bench").mkdir(parents=True)
    places = {"OLD": str(tmp_path / "old"), "NEW": str(new)}
    done = run(new, *(places.get(argument, argument) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(line.replace("OLD", places["OLD"]))


def git(tree: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True, cwd=tree).stdout


@pytest.mark.parametrize("ends", ["by itself", "by a signal"])
def test_a_commits_worktree_is_removed(tmp_path, ends):
    tree = stand_in(tmp_path / "tree")
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "first")
    (tree / "sdr_kernels" / "__init__.py").write_text(WORK.replace("20_000", "20_00"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    arguments = ["-k", "long" if ends == "by a signal" else "other", "--longest", "9", "--tolerance", "0.4"]
    process = subprocess.Popen(
        command(tree, "--base", "HEAD", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    if ends == "by a signal":
        end = time.monotonic() + 60
        while not list(tmp_path.glob("sdr_base_*/tree/bench")) or not list(tmp_path.glob("tmp*/new.log")):
            assert time.monotonic() < end, process.poll()
            time.sleep(0.05)
        assert len(git(tree, "worktree", "list").splitlines()) == 2
        os.killpg(process.pid, signal.SIGTERM)  # handled as Ctrl-C, which what runs in a shell's background ignores
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == (130 if ends == "by a signal" else 0), out + err
    assert "Traceback" not in err
    commit = git(tree, "rev-parse", "--short=7", "HEAD").strip()
    assert ends == "by a signal" or out.startswith(f"new: {commit} and changes; base: {commit}; 40 pairs")
    assert len(git(tree, "worktree", "list").splitlines()) == 1
    assert list(tmp_path.glob("sdr_base_*")) == []
    if ends == "by a signal":
        running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        assert not [line for line in running if str(tmp_path).encode() in line]


# ---------------------------------------------------------------- this repository's own benchmarks

INFO_NCE = "bench/bench_ops.py::bench_op[InfoNCE with gradient-cpu]"
TWICE = """

_forward, _backward = info_nce_fwd, info_nce_bwd


def info_nce_fwd(*arguments):
    _forward(*arguments)
    return _forward(*arguments)


def info_nce_bwd(*arguments):
    _backward(*arguments)
    return _backward(*arguments)
"""
WRONG = """

_backward = info_nce_bwd


def info_nce_bwd(*arguments):
    return 1.001 * _backward(*arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "code", "ending"),
    [
        ("", 0, "slower by more than 30 %: none; failed: none"),
        (TWICE, 1, f"slower by more than 30 %: {INFO_NCE}; failed: none"),
        (WRONG, 2, f"slower by more than 30 %: none; failed: {INFO_NCE}"),
    ],
    ids=["unchanged", "twice the work", "a wrong answer"],
)
def test_a_kernel_in_a_copy_of_this_tree(tmp_path, plant, code, ending):
    for name in ("sdr", "sdr_kernels", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "sdr_kernels" / "_cpu" / "info_nce.py").open("a") as file:
        file.write(plant)
    choice = ["--benchmarks", INFO_NCE, "--rounds", "12", "--tolerance", "0.3", "--longest", "20"]
    done = run(tmp_path, "--base", str(ROOT), *choice)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == ending
    assert ("FAILED in new: answers.WrongAnswer" in done.stdout) == (plant == WRONG)
