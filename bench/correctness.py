"""Step "correctness": the tests on real Triton, and the full-width model against float64."""

import copy
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from inputs import random_model, random_views
from ledger import NOT_MEASURED, Ledger, one_line, run_limited
from machine import ROOT, Machine
from torch import Tensor

from sdr.fast import SDRModel as FastSDRModel
from sdr.tpa import normalise

TESTS = [
    "test_temporal_*.py",
    "test_spatial_mean.py",
    "test_token_attention.py",
    "test_info_nce.py",
    "test_leave_one_out_kl.py",
    "test_sdr_loss.py",
    "test_clip_views.py",
    "test_norm_*.py",
    "test_row_products.py",
    "test_conv_grad.py",
    "test_stem_training.py",
    "test_normed_*.py",
    "test_grouped.py",
    "test_cuda_launches.py",
    "test_graphs.py",
    "test_fast.py",
    "test_gpu_promises.py",
]
REHEARSED = "test_datasets.py"  # has no kernel to interpret: the rehearsal is of running and counting
TESTS_SHARE = 0.75  # of the step's time; the model's checks, which fill the GPU, come after them
MAX_PROCESSES = 12  # each holds about 1 GB of the GPU's memory
LARGE = "2_31_elements"  # tests of one process: each holds tens of GB
LAST_WORDS_S = 6.0
NAMES = 20  # of failures that are kept
LOG_CHARACTERS = 3000
CLIPS = {"ftcn_released": 4, "paper": 5}  # of 4 branches: the first replays a CUDA graph, the second is too large
PRECISIONS = (("bf16", "bf16 from uint8"), ("fp16",), ("fp32",))  # checked beside each other
REPEATS = {"fp32": 25, "fp16": 250, "bf16": 250, "bf16 from uint8": 250}  # float32 has no tensor cores
ALLOWED = 2.0  # of the reference's own error in the same dtype
# cuBLAS is repeatable only with this; and the float32 reference must not round to TF32
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0"}


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short", *arguments]


def environment() -> dict[str, str]:
    """Of a test process: real Triton, repeatable products, no TF32 in the float32 reference."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ENVIRONMENT


def collect(files: list[Path], limit_s: float, log: Path) -> list[str]:
    """Names of all tests in these files, as pytest takes them.

    Raises:
        RuntimeError: pytest could not read them.
    """
    command = pytest_command("--collect-only", "-q", *(str(path.relative_to(ROOT)) for path in files))
    code = run_limited(command, limit_s, log, cwd=ROOT, env=environment())
    text = log.read_text(errors="replace")
    if code != 0:
        raise RuntimeError(f"pytest --collect-only: exit code {code}: {text[-1000:]}")
    return [line for line in text.splitlines() if re.match(r"\S+\.py::", line)]


def outcomes_of(text: str) -> Iterator[tuple[str, str]]:
    """File and outcome of each test that ``pytest -v`` printed so far, cut off or not."""
    for name, outcome in re.findall(r"^(\S+\.py)::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", text, re.MULTILINE):
        yield name, outcome.lower()


def run_shard(names: list[str], limit_s: float, log: Path) -> str:
    """What a process of its own prints while it runs these tests; near the limit it is told to say what failed."""
    command = ["timeout", "--signal=INT", f"{max(1.0, limit_s - LAST_WORDS_S):.0f}", *pytest_command("-v", *names)]
    run_limited(command, limit_s, log, cwd=ROOT, env=environment())
    return log.read_text(errors="replace")


def summarise(names: list[str], texts: list[str]) -> dict[str, object]:
    """Counts of all and of each file; a test without an outcome, as where its process ended early, is missing."""
    counts = {name.partition("::")[0]: dict.fromkeys(("passed", "failed", "error", "skipped"), 0) for name in names}
    for text in texts:
        for file, outcome in outcomes_of(text):
            counts[file][outcome] += 1
    totals = {key: sum(count[key] for count in counts.values()) for key in ("passed", "failed", "error", "skipped")}
    missing = len(names) - sum(totals.values())
    bad = [line for text in texts for line in re.findall(r"^(?:FAILED|ERROR) .+$", text, re.MULTILINE)]
    return {**totals, "missing": missing, "files": counts, "names": bad[:NAMES]}


def run_tests(limit_s: float, machine: Machine) -> dict[str, object]:
    """Run all tests, spread over processes: compiling the kernels of many shapes is what takes their time."""
    deadline = time.monotonic() + limit_s
    patterns = [REHEARSED] if machine.rehearsal else TESTS
    files = sorted(path for pattern in patterns for path in (ROOT / "tests").glob(pattern))
    processes = machine.scaled(max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) - 2)), 1)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(processes + 1) as pool:
        names = collect(files, limit_s, Path(folder) / "collect")
        small, large = ([name for name in names if (LARGE in name) is wanted] for wanted in (False, True))
        shards = [shard for shard in (large, *(small[i::processes] for i in range(processes))) if shard]
        left = deadline - time.monotonic()
        texts = list(pool.map(lambda i: run_shard(shards[i], left, Path(folder) / str(i)), range(len(shards))))
    result = summarise(names, texts)
    if result["failed"] or result["error"] or result["missing"]:
        result["log"] = max(texts, key=lambda text: len(re.findall("FAILED|ERROR", text)), default="")[-LOG_CHARACTERS:]
    return result


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the error over that of the truth; NaN where a value is not finite."""
    return ((value.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def parts_of(output: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Tokens, features and all heads' values together: a few logits alone could be right by chance."""
    logits, tokens, features, joint, loo = output
    return {"tokens": tokens, "features": features, "logits": torch.cat([x.flatten() for x in (logits, joint, loo)])}


def check_model(model: torch.nn.Module, views: Tensor, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """The fast model against the same rounded weights in float64, measured by the reference in ``dtype``.

    Args:
        model: reference in float32.
        views: uint8 or of ``dtype``.
        dtype: of the weights and products.
        repeats: how often the output must come out the same.
    """
    reference = copy.deepcopy(model).to(dtype)
    fast = FastSDRModel.from_reference(reference).eval()
    with torch.inference_mode():
        got = fast(views)
        eager = parts_of(reference(normalise(views).to(dtype)))
        repeatable = all(all(torch.equal(x, y) for x, y in zip(got, fast(views), strict=True)) for _ in range(repeats))
        wide = reference.double()
        exact = [wide(normalise(clip[None]).double()) for clip in views]  # one at a time: float64 takes memory
    truth = parts_of(tuple(torch.cat(values) for values in zip(*exact, strict=True)))
    errors = {}
    for name, value in parts_of(got).items():
        error, of_eager = relative_error(value, truth[name]), relative_error(eager[name], truth[name])
        ratio = error / of_eager if of_eager else math.inf
        errors[name] = {"error": error, "eager": of_eager, "ratio": ratio, "passed": ratio <= ALLOWED}
    return {"errors": errors, "repeats": repeats, "bit_equal": repeatable}


def check_dtype(names: tuple[str, ...], machine: Machine) -> dict[str, dict[str, object] | str]:
    """Both presets in the precisions of these names; a result each, or the reason why there is none."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = {}
    for preset, config in machine.configs().items():
        model, clips = random_model(config, machine.device), machine.scaled(CLIPS[preset], 2)
        for name in names:
            dtype = machine.dtypes[name.partition(" ")[0]]
            repeats = machine.scaled(REPEATS[name], 3)
            views = random_views(config, clips, machine.device, torch.uint8 if "uint8" in name else dtype)
            try:
                results[f"{preset} {name}"] = check_model(model, views, dtype, repeats)
            except Exception as error:  # counts as a failed check, and the next precision is still checked
                results[f"{preset} {name}"] = NOT_MEASURED + one_line(error)
            machine.release()
    return results


def passed(result: object) -> bool:
    """The model came out the same every time and erred no more than it may."""
    if not isinstance(result, dict):
        return False
    return bool(result["bit_equal"]) and all(part["passed"] for part in result["errors"].values())


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter the test counts, the model's errors, and ``failed``: how many tests and model checks did not pass."""
    ledger.put("failed", 1)  # until all have run
    tests = ledger.attempt("tests", lambda: run_tests(TESTS_SHARE * ledger.left(), machine))
    bad = sum(tests[key] for key in ("failed", "error", "missing")) if isinstance(tests, dict) else 1
    # a process for each: compiling takes the time, and one that crashes takes no other with it
    spawn = get_context("spawn")
    pools = [] if machine.rehearsal else [ProcessPoolExecutor(1, spawn) for _ in PRECISIONS]
    futures = [pool.submit(check_dtype, names, machine) for pool, names in zip(pools, PRECISIONS, strict=False)]
    for i, names in enumerate(PRECISIONS):
        try:
            results = futures[i].result() if futures else check_dtype(names, machine)
        except BrokenProcessPool as error:
            results = dict.fromkeys(names, NOT_MEASURED + one_line(error))
        for name, result in results.items():
            ledger.put(name, result)
            bad += not passed(result)
    ledger.put("failed", bad)
