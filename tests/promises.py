"""What this software promises: rows that tests name by ``@pytest.mark.promise(row="...")``, and how they last ended.

A pytest plugin: ``pytest -m "promise(row='atomic')"`` runs the tests of one row, ``--promises FILE`` keeps how the
chosen tests ended, by row and file of tests; what FILE says of others stays. ``python tests/promises.py`` writes the
tables of docs/promises.md from tests/results.
"""

import json
import platform
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from draws import SEED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "promises.md"
RESULTS, PLANTED = (ROOT / "tests" / "results" / name for name in ("promises.json", "planted_faults.json"))
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

KERNELS = {
    "registered right": "every public op passes torch.library.opcheck, torch.compile(fullgraph=True) and torch.export",
    "accurate": "error against float64 at most twice that of the same precision in plain torch, plus 4 ulp",
    "odd inputs": "any size, any strides, misaligned; NaN and Inf stay where float64 has them; no input is modified",
    "in bounds": "no access outside the tensors",
    "large": "right beyond 2^31 elements, or refused in one line before the launch",
    "repeatable": "repeats are equal bit for bit, forward and backward",
    "well behaved": "the caller's stream and device, CUDA graphs, threads, no waiting for the device in a step",
    "equal in training": "reference and fast take the same steps of training within rounding",
    "absent parts": "without GPU, Triton, DALI, CuPy or the built module: same calls, same numbers, one line of log",
}
FILES = {
    "hostile files": "every file ends as a score or one line that names it; nothing but the given file is opened",
    "fuzz": "mutated files of every kind: no crash, no hang, no exception but ours",
    "true frames": "every frame once and in order; what is damaged or missing is reported",
    "isolation": "decoding runs in a process with limits, which may reach nothing; a killed one is one failed file",
    "no substitution": "a bad sample is an error or a listed skip, and never replaced by another",
    "limits": "size, pixels, frames and seconds of a video are checked before anything is allocated",
}
RUNS = {
    "no code from files": "no file of a user can run code, and what a file may take is bounded",
    "atomic": "a file is written whole or not at all; the newest whole checkpoint counts",
    "kill -9": "a run killed at any moment ends, once resumed, as one that was not",
    "pre-emption": "SIGTERM or SIGUSR1: a checkpoint, exit code 143, within 30 s",
    "disk full, read-only": "one line, and what was there before stays whole",
    "odd surroundings": "vanished input, wrong clock, damaged or shared cache, no home, any path, any locale",
    "state": "a run goes on with all of its state, and a mismatch names the field",
    "augmentation": "a pure function of seed, epoch, sample and view",
    "numbers": "non-finite steps are skipped and named; edge cases give finite losses and gradients",
    "memory": "scoring halves its batch when memory runs out; training says which setting to change",
    "soak": "many clips leave memory, descriptors, threads and shared memory as they were",
    "supply": "versions without known holes, no network but asked-for downloads, no shell, eval or unsafe loader",
    "metrics": "AUC, accuracy and EER equal exact values, ties included; clips and videos are told apart",
}
ROWS = KERNELS | FILES | RUNS

TABLES = {"Kernels": KERNELS, "Video and files": FILES, "Checkpoints, training, data": RUNS}
PEAKS = ("most ", "longest ", "largest ")  # of figures of one name the largest counts; others are added up


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", metavar="FILE", help="keep in FILE (JSON) how the tests of each promise ended")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each report of a test says the rows that it holds; a row that does not exist is an error."""
    for item in items:
        for marker in item.iter_markers("promise"):
            if marker.kwargs.get("row") not in ROWS:
                raise pytest.UsageError(f"{item.nodeid}: no such promise: {marker}")
            item.user_properties.append(("promise", marker.kwargs["row"]))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--promises")
    if path and not hasattr(config, "workerinput"):  # the processes of xdist report to this one
        config.pluginmanager.register(Results(Path(path)))


class Results:
    """Gathers reports and writes them when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.figures: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        self.seconds: Counter = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        properties = [tuple(pair) for pair in report.user_properties]
        for row in sorted({value for name, value in properties if name == "promise"}):
            key = row, report.nodeid.partition("::")[0]
            self.counts[key][report.outcome] += 1
            self.seconds[key] += report.duration
            figures = self.figures[key]
            for name, value in properties:
                if name != "promise":
                    both = (figures[name], value) if name in figures else (value,)
                    figures[name] = max(both) if name.startswith(PEAKS) else sum(both)

    def pytest_sessionfinish(self) -> None:
        stamp = {**stamp_here(), "seed": SEED}
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        for (row, file), counts in self.counts.items():
            figures = {name: round(value, 6) for name, value in sorted(self.figures[row, file].items())}
            result = {**counts, "seconds": round(self.seconds[row, file], 1), "figures": figures, "stamp": stamp}
            kept.setdefault(row, {})[file] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def stamp_here() -> dict[str, str]:
    """Of this tree and machine. A commit with ``+`` had changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return {"commit": done.stdout.strip() or "unknown", "date": day, "machine": gpu, "versions": versions}


def result_text(name: str, result: dict) -> str:
    """One file's cell: what ended how, at which commit, and its figures."""
    counts = ", ".join(f"{result[kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in result)
    figures = "".join(f"; {what}: {value:,.6g}" for what, value in result["figures"].items())
    stamp = ", ".join(result["stamp"][part] for part in ("commit", "date", "machine"))
    return f"`{Path(name).name}`: {counts}{figures} ({stamp})"


def tables_text(results: dict, faults: Sequence[dict]) -> str:
    """The tables of the page: a row each promise, a row each planted fault."""
    parts = []
    for title, rows in TABLES.items():
        parts += [f"## {title}", "", "| row | what is promised | tests and how they last ended |", "|---|---|---|"]
        for row, promise in rows.items():
            ran = results.get(row, {})
            cell = "<br>".join(result_text(name, ran[name]) for name in sorted(ran)) or "not run"
            parts.append(f"| {row} | {promise} | {cell} |")
        parts.append("")
    parts += ["## Planted faults", "", "| fault | test that must catch it | outcome |", "|---|---|---|"]
    parts += [f"| {fault['what']} | `{fault['test']}` | {fault['outcome']} |" for fault in faults]
    return "\n".join(parts)


def with_tables(page: str) -> str:
    """The page with the part between its marks as tests/results says."""
    before, _, rest = page.partition(BEGIN)
    text = tables_text(json.loads(RESULTS.read_text()), json.loads(PLANTED.read_text()))
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
