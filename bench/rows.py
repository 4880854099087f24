"""Every committed result as rows of one form, whatever wrote it.

Two forms hold measurements: what ``pytest bench --benchmark --record`` writes (pytest-benchmark's JSON with our
``extra_info``), and what ``make gpu`` writes. A third, ``tables``, holds figures of earlier runs that were copied by
hand with where they come from. The kernels' audit and the loss curves have forms of their own; studies belong to
another command.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ledger import NOT_MEASURED
from summary import summarise

NAMED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # dtypes, as the names of entries have them
SUITE, GPU = "pytest bench --benchmark --record", "make gpu"
MODEL = r"(?P<kind>inference|latency) (?P<what>\w+) (?P<how>.+)"
BLOCK = r"block (?P<what>[^,]+), (?P<clips>\d+ clips): (?P<how>.+)"
# what a step of `make gpu` calls its entries: pattern, subject, op where the entry names none, implementation
ENTRIES = {
    "timings": [
        (r"op (?P<what>[^,]+), .*", "{what}, {clips} x 4 branches", "", "auto"),
        (MODEL + ", 1 branch", "{kind} {what}, {clips} x 1 branch", "model", "{how}"),
        (MODEL, "{kind} {what}, {clips} x 4 branches", "model", "{how}"),
        (r"frames (?P<n>\d+)", "inference ftcn_released, {clips} x 4 branches, {n} frames", "model", "bf16 scaling"),
        (r"branches (?P<n>\d+)", "inference ftcn_released, {clips} x {branches}", "model", "bf16 scaling"),
        (r"import to first result, (?P<how>.+)", "import to first result", "first result", "{how}"),
    ],
    "losses": [(r"(?P<what>.+), (?P<how>[^,]+)", "{what}", "losses", "{how}")],
    "views": [
        (r"loader, (?P<how>.+)", "loader", "loader", "{how}"),
        (r"(?P<how>[^,]+), (?P<what>.+)", "{what}", "views", "{how}"),
    ],
    "training": [
        (r"(step|peer) (?P<how>.+)", "training step ftcn_released, {clips} x 4 branches", "training step", "{how}"),
        (r"memory (?P<how>.+)", "memory of a training step, 4 branches", "memory", "{how}"),
    ],
    "peers": [
        (BLOCK, "{what}, {clips} x 4 branches", "temporal_bottleneck", "{how}"),
        (r"(?P<how>.+), \d+ clips", "inference ftcn_released, {clips} x 4 branches", "model", "{how}"),
    ],
}


class NotAResultError(ValueError):
    """A file among the results that is none, in one line."""


@dataclass(frozen=True)
class Row:
    """One figure, or the reason why there is none.

    Args:
        subject: what is timed and compared.
        op: of sdr_kernels, or "model", "training step", "views", "loader", "decode" and so on.
        impl: what ran.
        dtype: as "bfloat16"; "" where it is not known.
        threads: of a CPU, 0 for a GPU.
        median_s: seconds; None where it was not measured.
        reason: why not.
        figures: what else was recorded, by interface name: spread, flops, bytes, floor_s, share_of_floor, bound, clips,
            clips_per_s, peak_bytes, bytes_per_clip, baseline, count.
    """

    subject: str
    op: str = ""
    impl: str = ""
    dtype: str = ""
    threads: int = 0
    median_s: float | None = None
    reason: str = ""
    figures: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """All rows of one file.

    Args:
        file: its name.
        command: that wrote it.
        device: GPU or CPU.
        commit: seven digits, "-dirty" behind them where files differed.
        date: ISO 8601, with the time behind it.
        versions: of what a figure depends on, by package.
        ceilings: FLOP/s by dtype and bytes/s, by the number of threads.
        rows: in the file's order.
        targets: the summary of `make gpu`.
    """

    file: str
    command: str
    device: str
    commit: str
    date: str
    versions: dict[str, str]
    ceilings: dict[int, dict]
    rows: tuple[Row, ...]
    targets: tuple[dict, ...] = ()

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.median_s is not None]


@dataclass
class Results:
    """What a folder holds.

    Args:
        runs: by device, then by date.
        tables: that were copied by hand.
        audit: the kernels' audit, None where there is none.
        curves: columns of loss curves by file.
        errors: a line for each file that is no result.
    """

    runs: list[Run] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)
    audit: dict | None = None
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def newest(self, command: str) -> list[Run]:
        """Of each device, the last run of a command."""
        return list({run.device: run for run in self.runs if run.command == command}.values())


def read_results(folder: Path) -> Results:
    """Everything in the folder; what is not understood is an error line, and the rest still counts."""
    results = Results()
    for path in sorted(folder.glob("*.json")):
        try:
            _add(results, path.name, json.loads(path.read_text(encoding="utf-8")))
        except (NotAResultError, json.JSONDecodeError, UnicodeDecodeError) as error:
            results.errors.append(f"{path.name}: {error}")
        except (KeyError, TypeError, AttributeError) as error:
            results.errors.append(f"{path.name}: a part is missing or of another form: {type(error).__name__}: {error}")
    for path in sorted(folder.glob("loss_curves*.csv")):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            results.curves[path.name] = {name: [float(row[name]) for row in rows] for name in rows[0]}
        except (IndexError, TypeError, ValueError):
            results.errors.append(f"{path.name}: holds no columns of numbers")
    results.runs.sort(key=lambda run: (run.device, run.date, run.file))
    return results


def _add(results: Results, name: str, content: object) -> None:
    """By the keys that only one form has."""
    keys = set(content) if isinstance(content, dict) else set()
    if {"benchmarks", "machine_info"} <= keys:
        results.runs.append(suite_run(name, content))
    elif {"steps", "stamp"} <= keys:
        results.runs.append(gpu_run(name, content))
    elif {"tables", "about"} <= keys:
        results.tables += content["tables"]
    elif {"triton", "rows"} <= keys:
        results.audit = content
    elif not {"study", "runs"} <= keys:
        raise NotAResultError("is neither a run of the benchmarks nor of make gpu, nor any other result")


def stamped(name: str, command: str, stamp: dict, **rest: object) -> Run:
    """A run with what its stamp says."""
    dirty = "-dirty" if stamp["dirty"] is True else ""
    gpu = stamp["gpu"] != "none"
    versions = {key: str(stamp[key]) for key in ("torch", "triton", "python")}
    versions |= {key: str(stamp[key]) for key in ("cuda", "driver") if gpu}
    return Run(
        file=name,
        command=command,
        device=str(stamp.get("device", stamp["gpu"])),
        commit=str(stamp["commit"])[:7] + dirty,
        date=f"{stamp['date']} {stamp['time']}",
        versions=versions,
        **rest,
    )


def suite_run(name: str, content: dict) -> Run:
    """Of pytest-benchmark's JSON."""
    machine = content["machine_info"]
    if "stamp" not in machine:
        raise NotAResultError("has no stamp: --record writes one")
    ceilings = machine.get("ceilings_by_threads") or {}
    if not ceilings and "ceilings" in machine:
        ceilings = {machine["ceilings"]["threads"]: machine["ceilings"]}
    rows = [_suite_row(benchmark) for benchmark in content["benchmarks"]]
    rows += [Row(what, reason=reason) for what, reason in content.get("not_measured", {}).items()]
    by_threads = {int(threads): value for threads, value in ceilings.items()}
    return stamped(name, SUITE, machine["stamp"], ceilings=by_threads, rows=tuple(rows))


def _suite_row(benchmark: dict) -> Row:
    info = benchmark["extra_info"]
    return Row(
        subject=info.get("subject", benchmark["name"]),
        op=info.get("op", ""),
        impl=info.get("impl", ""),
        dtype=str(info.get("dtype", "")).removeprefix("torch."),
        threads=info.get("threads", 0),
        # a process is timed by itself: pytest-benchmark's figure has its start in it
        median_s=info.get("cold_median_s", benchmark["stats"]["median"]),
        figures=info,
    )


def counted(number: int, noun: str) -> str:
    """As "1 clip", "4 branches"."""
    plural = {"clip": "clips", "branch": "branches", "frame": "frames", "thread": "threads"}
    return f"{number} {noun if number == 1 else plural[noun]}"


def gpu_run(name: str, content: dict) -> Run:
    """Of a JSON of `make gpu`."""
    if content.get("rehearsal"):
        raise NotAResultError("is a rehearsal, and no result")
    steps = {step: outcome.get("result", {}) for step, outcome in content["steps"].items()}
    found = steps.get("ceilings", {}).get("ceilings")
    rows = [row for step, entries in steps.items() for row in gpu_rows(step, entries)]
    ceilings = {0: found} if isinstance(found, dict) else {}
    return stamped(name, GPU, content["stamp"], ceilings=ceilings, rows=tuple(rows), targets=tuple(summarise(steps)))


def gpu_rows(step: str, entries: dict[str, object]) -> Iterator[Row]:
    """Rows of a step's entries: those that were timed, and those that have a reason why not."""
    for key, entry in entries.items():
        matches = [(re.fullmatch(pattern, key), *rest) for pattern, *rest in ENTRIES.get(step, [])]
        match, subject, op, impl = next((found for found in matches if found[0]), (None,) * 4)
        if match is None:
            continue
        if isinstance(entry, str):
            yield Row(key, op=op, reason=entry.removeprefix(NOT_MEASURED))
            continue
        parts = {"clips": counted(entry.get("clips", 0), "clip"), **match.groupdict()}
        yield Row(
            subject=subject.format(**parts, branches=counted(int(parts.get("n", 0)), "branch")),
            op=entry.get("op", op),
            impl=impl.format(**parts),
            dtype=entry.get("dtype") or next((dtype for name, dtype in NAMED.items() if name in key), ""),
            median_s=entry.get("median_s", entry.get("seconds")),
            figures=entry,
        )
