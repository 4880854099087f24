"""`make gpu` as far as a CPU goes: the work it counts, its steps' budgets, its refusal, and a whole rehearsal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sdr import tiny

ROOT = Path(__file__).parent.parent
GPU = ROOT / "bench" / "gpu.py"
# peers that may not be installed, and their packages
PEERS = {
    "torchvision v2": "torchvision",
    "kornia": "kornia",
    "leave-one-out KL, Liger": "liger_kernel",
    "block res3.2, 2 clips: cuDNN frontend bf16": "cudnn",
    "TensorRT": "tensorrt",
}


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return import_module


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, str(GPU), *arguments], capture_output=True, text=True, check=False, env=env, cwd=ROOT
    )


def script(code: str) -> tuple[str, ...]:
    """A step's command: Python code that finds its own arguments behind it."""
    return sys.executable, "-c", code


RECORDS = "import json, sys; json.dump({{'seen': {}}}, open(sys.argv[2], 'w'))"


def test_a_failing_and_a_hanging_step_leave_the_rest(bench, tmp_path):
    ledger = bench("ledger")
    started = tmp_path / "started"
    # what a step starts in a session of its own must end with it
    hangs = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
open({str(started)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    steps = [
        ledger.Step("hangs", 3.0, True, script(hangs)),
        ledger.Step("first", 10.0, False, script(RECORDS.format(1))),
        ledger.Step("fails", 10.0, True, script(RECORDS.format(2) + "; sys.exit('the reason')")),
        ledger.Step("absent", 10.0, False, ("/nonexistent/program",)),
        ledger.Step("last", 10.0, True, script(RECORDS.format(3))),
    ]
    report = {"steps": {}}
    start = time.monotonic()
    ledger.run_steps(steps, report, tmp_path / "report.json", tmp_path)
    assert time.monotonic() - start < 20
    assert json.loads((tmp_path / "report.json").read_text()) == report
    outcomes = report["steps"]
    assert {name: outcome["result"].get("seen") for name, outcome in outcomes.items()} == {
        "first": 1,
        "fails": 2,
        "hangs": None,
        "absent": None,
        "last": 3,
    }
    assert outcomes["first"]["status"] == outcomes["last"]["status"] == "done"
    assert outcomes["fails"]["status"] == "failed with exit code 1"
    assert "the reason" in outcomes["fails"]["log"]
    assert outcomes["hangs"]["status"].startswith("overran its ")
    assert outcomes["absent"]["status"] == "failed"
    assert "/nonexistent/program" in outcomes["absent"]["log"]
    assert ledger.failures(steps, report) == ["hangs", "fails"]
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.promise(row="equal in training")
def test_losses_by_kernels_stay_with_the_references_for_200_steps(bench):
    curves = bench("curves")
    config = replace(tiny(), **curves.SMALL)
    found = curves.compare(config, "cpu", torch.device("cpu"))
    assert found["reference"][-1] < 0.1 * found["reference"][0]
    assert max(curves.apart(found).values()) <= curves.BAND


def test_budgets_stay_below_ten_minutes(bench):
    steps = bench("gpu").STEPS
    assert [name for name, *_ in steps] == [
        "correctness",
        "sanitizer",
        "ceilings",
        "timings",
        "losses",
        "views",
        "training",
        "peers",
        "profiling",
    ]
    assert sum(budget_s for _, budget_s, _ in steps) <= 580
    assert [name for name, _, must_pass in steps if must_pass] == ["correctness", "sanitizer", "training"]


def test_an_attempt_enters_the_reason_of_what_it_could_not_measure(bench, tmp_path):
    ledger = bench("ledger").Ledger(tmp_path / "step.json", 60.0)

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    ledger.attempt("peer", out_of_memory)
    ledger.attempt("late", lambda: 1, needs_s=61.0)
    ledger.attempt("good", lambda: {"median_s": 1.0})
    assert json.loads((tmp_path / "step.json").read_text()) == {
        "peer": "not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB",
        "late": "not measured: no time was left in the step's 60 s",
        "good": {"median_s": 1.0},
    }


def test_refuses_without_a_gpu_in_one_line():
    done = command(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "make gpu: no CUDA GPU found\n"


def test_make_gpu_runs_the_command():
    done = subprocess.run(
        ["make", "gpu", f"VENV={sys.prefix}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "make gpu: no CUDA GPU found" in done.stderr


def test_a_rehearsal_never_writes_among_the_results():
    done = command("--rehearse", "--out", str(ROOT / "bench" / "results" / "new"))
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: a rehearsal is no result: --out must lie outside ")
    assert not (ROOT / "bench" / "results" / "new").exists()


def test_a_model_check_that_raises_has_failed_and_the_next_one_runs(bench, monkeypatch, tmp_path):
    correctness, calls = bench("correctness"), []

    def check(model, views, dtype, repeats):
        calls.append(dtype)
        if dtype == torch.bfloat16:
            raise RuntimeError("out of memory")
        return {"errors": {}, "repeats": repeats, "bit_equal": True}

    monkeypatch.setattr(correctness, "check_model", check)
    results = correctness.check_dtype(("bf16", "fp16"), bench("machine").Machine(True, tmp_path / "report.json"))
    assert calls == [torch.bfloat16, torch.float16] * 2
    assert "out of memory" in results["paper bf16"]
    assert [correctness.passed(results[f"paper {name}"]) for name in ("bf16", "fp16")] == [False, True]


def test_the_sanitizer_runs_every_kernel(bench):
    kernels = {path.stem for path in (ROOT / "sdr_kernels" / "_triton").glob("[!_]*.py")}
    sanitizer = bench("sanitizer")
    of_training = {"norm_conv", "norm_pool", "row_products", "conv_grad", "stem_training"}  # run as what they make up
    trained = {"normed_stem", "normed_bottleneck gram", "normed_bottleneck fused"}
    assert set(sanitizer.SMALL_SHAPES) - trained == kernels - of_training
    cuda = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    assert set(sanitizer.CUDA_SHAPES) == set(sanitizer.CUDA_DTYPES) == {f"{op} in CUDA" for op in cuda}


@pytest.mark.promise(row="in bounds")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted under the interpreter")
def test_the_sanitizer_launches_every_kernel(bench, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, run = set(), GridExecutor.__call__

    def counted(self, *arguments, **options):
        launched.add(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    sanitizer, cpu = bench("sanitizer"), torch.device("cpu")
    assert sanitizer.run_small_shapes(sanitizer.small_runs(cpu), cpu) > 60
    sources = "".join(path.read_text() for path in (ROOT / "sdr_kernels" / "_triton").glob("*.py"))
    assert launched == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))


@pytest.mark.parametrize(
    ("prints", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", {"errors": 0, "exit_code": 0}),
        ("========= Invalid read\n========= ERROR SUMMARY: 2 errors", {"errors": 2, "exit_code": 0}),
        ("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", {"errors": 1, "exit_code": 0}),
        ("========= Error: Device not supported", "not measured: no summary, exit code 0: "),
    ],
)
def test_reads_what_the_sanitizer_found(bench, tmp_path, prints, expected):
    fake = [sys.executable, "-c", f"print({prints!r})"]
    result = bench("sanitizer").run_tool(fake, 30.0, tmp_path / "log", dict(os.environ))
    if isinstance(expected, str):
        assert result.startswith(expected)
    else:
        assert {key: result[key] for key in expected} == expected
        assert ("log" in result) == (expected["errors"] > 0)


def test_counts_tests_of_a_run_that_was_cut_off(bench):
    names = ["tests/test_a.py::test_x[1, 2]", "tests/test_a.py::test_y", "tests/test_b.py::test_z"]
    text = f"{names[0]} PASSED [ 33%]\n{names[1]} FAILED [ 66%]\n{names[2]} "
    result = bench("correctness").summarise(names, [text])
    assert (result["passed"], result["failed"], result["missing"]) == (1, 1, 1)
    assert result["files"]["tests/test_a.py"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}


def results(**changes) -> dict:
    """What the steps of a run found that meets every must and no goal."""
    timings = {
        "inference ftcn_released bf16": {"clips": 16, "clips_per_s": 800.0, "share_of_floor": 0.6},
        "latency ftcn_released bf16 wall": {"median_s": 1.5e-3},
        "latency ftcn_released bf16 wall, 1 branch": {"median_s": 0.7e-3},
        "import to first result, empty cache": {"seconds": 5.0},
        "deviation from linear, frames": {"8": 0.1, "32": 0.0},
        "deviation from linear, branches": {"1": -0.05, "4": 0.0},
        "op res3.0, 16 clips, ftcn_released": {
            "clips": 16, "count": 1, "median_s": 4e-3, "floor_s": 2e-3, "share_of_floor": 0.5, "bound": "arithmetic",
            "flops": 16 * 10**11, "bytes": 10**9,
        },
    }  # fmt: skip
    peers = {
        "eager loop bf16 NCTHW, 16 clips": {"clips": 16, "clips_per_s": 200.0},
        "torch.func.vmap bf16, 16 clips": {"clips": 16, "clips_per_s": 700.0},  # not among the peers to beat
        "CUDA graph over eager, 1 clips": {"clips": 1, "clips_per_s": 999.0},
        "torch.compile default bf16, 16 clips": "not measured: OutOfMemoryError: CUDA out of memory",
    }
    profile = {"inference, 16 clips": {"idle_share": 0.02, "launches": 14.0}}
    correctness = {"failed": 0, "paper bf16": {"errors": {"tokens": {"ratio": 1.5}}}}
    views = {
        "clip_views, 16 clips x 4 views bf16": {"clips": 16, "clips_per_s": 20_000.0},
        "loader, triton": {"clips_per_s": 960.0},
        "loader, dali": "not measured: DALI: is not installed",
    }
    return {
        "timings": timings | changes,
        "views": views,
        "peers": peers,
        "profiling": profile,
        "correctness": correctness,
    }


def verdicts(bench, found: dict) -> dict[str, tuple]:
    return {row["what"]: (row["measured"], row["verdict"]) for row in bench("summary").summarise(found)}


def test_summary_judges_by_must_and_goal(bench):
    rows = verdicts(bench, results())
    assert rows["inference, 16 clips x 4 branches"] == (800.0, "must")
    assert rows["... against the best peer"] == (4.0, "must")
    assert rows["V 1..16, off linear in work"] == (5.0, "goal")
    assert rows["error, in units of eager's in the same dtype"] == (1.5, "must")
    assert rows["TPA, 4 views of 16 uint8 clips in bf16"] == (20_000.0, "must")
    assert rows["loader by triton against inference"] == (1.2, "must")
    assert rows["loader by dali against inference"] == (None, "not measured: DALI: is not installed")
    why = "res3.0 4000 us, 50 % of floor (400 TFLOP/s); GPU idle 2 % between 14 launches"
    assert rows["... share of floor"] == (60.0, f"short of goal: {why}")


def test_summary_says_why_a_figure_falls_short_or_is_missing(bench):
    slow = {"clips": 16, "clips_per_s": 500.0, "share_of_floor": 0.4}
    changes = {"inference ftcn_released bf16": slow, "import to first result, empty cache": "not measured: no Python"}
    rows = verdicts(bench, results(**changes))
    assert rows["inference, 16 clips x 4 branches"][1].startswith("short: res3.0 4000 us, 50 % of floor")
    assert rows["import to first result, nothing cached"] == (None, "not measured: no Python")
    assert all(verdict.startswith("not measured: ") for _, verdict in verdicts(bench, {}).values())


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    folder = tmp_path_factory.mktemp("rehearsal")
    done = command("--rehearse", "--out", str(folder), "--commit", "0123456789")
    (file,) = folder.iterdir()
    assert file.name.endswith("_0123456.json") or file.name.endswith("_0123456-dirty.json")
    return done, json.loads(file.read_text())


@pytest.mark.slow
def test_rehearsal_executes_every_step(rehearsal, bench):
    done, report = rehearsal
    logs = {
        name: (step["status"], step.get("log"), step["result"].get("plain run"))
        for name, step in report["steps"].items()
    }
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    assert report["rehearsal"] is True
    assert report["failed"] == []
    steps = report["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {name: "done" for name, *_ in bench("gpu").STEPS}
    missing = {
        key: value
        for step in steps.values()
        for key, value in step["result"].items()
        if isinstance(value, str) and value.startswith("not measured: ") and "compute-sanitizer not found" not in value
    }
    absent = {name for name, package in PEERS.items() if find_spec(package) is None}
    assert {re.sub(r", \d+ clips( x 4 views bf16)?$", "", key) for key in missing} == absent | {
        "InfoNCE, Liger",
        "NVDEC against PyAV, H.264",
        "CUDA graph over eager bf16 channels_last_3d",
        "CUDA graph over torch.compile default bf16",
    }
    assert steps["correctness"]["result"]["tests"]["passed"] > 0
    assert steps["sanitizer"]["result"]["plain run"] == "passed"
    assert set(report["stamp"]) >= {"gpu", "driver", "torch", "triton", "cuda", "python", "commit", "dirty", "date"}


@pytest.mark.slow
def test_rehearsal_is_marked_as_no_measurement(rehearsal):
    done, report = rehearsal
    assert "rehearsal, not a measurement" in done.stdout.splitlines()
    assert all(row["what"] in done.stdout for row in report["summary"])
    assert all(row["measured"] is not None for row in report["summary"])


@pytest.mark.slow
def test_rehearsal_gives_every_op_a_floor(rehearsal):
    ops = {k: v for k, v in rehearsal[1]["steps"]["timings"]["result"].items() if k.startswith("op ")}
    assert {row["op"] for row in ops.values()} == {
        "temporal_stem",
        "temporal_bottleneck",
        "spatial_mean",
        "norm_linear",
        "token_attention",
    }
    assert all(row["floor_s"] > 0 and row["share_of_floor"] > 0 and row["bound"] for row in ops.values())


@pytest.mark.slow
def test_an_interrupted_run_leaves_what_was_done(tmp_path):
    arguments = ["--rehearse", "--out", str(tmp_path), "--steps", "ceilings", "peers"]
    process = subprocess.Popen(
        [sys.executable, str(GPU), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline().startswith("ceilings     done")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    (file,) = tmp_path.iterdir()
    steps = json.loads(file.read_text())["steps"]
    assert steps["ceilings"]["result"]["ceilings"]["bytes_per_s"] > 0
    assert steps["peers"]["status"] == "cut off with the run"
