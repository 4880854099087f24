"""Steps with time budgets, each in a process of its own, and the one JSON that holds what they found.

A process of its own: a hung kernel can be ended, an illegal access spoils nothing after it, and memory is given back.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NOT_MEASURED = "not measured: "
ERROR_CHARACTERS = 2000


def write_json(path: Path, value: object) -> None:
    """Replace the file at once, so that a cut-off run leaves the last whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def measured(value: object) -> bool:
    """The value is a result and neither absent nor the reason why there is none."""
    return value is not None and not (isinstance(value, str) and value.startswith(NOT_MEASURED))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class Ledger:
    """What a step has found so far, on disk after every entry.

    Args:
        path: of the step's own JSON.
        limit_s: the step's time budget in seconds, from now.
    """

    def __init__(self, path: Path, limit_s: float) -> None:
        self.path = path
        self.limit_s = limit_s
        self.deadline = time.monotonic() + limit_s
        self.entries: dict[str, object] = {}

    def left(self) -> float:
        """Seconds until the step is ended."""
        return self.deadline - time.monotonic()

    def put(self, key: str, value: object) -> None:
        self.entries[key] = value
        write_json(self.path, self.entries)

    def attempt(self, key: str, call: Callable[[], object], *, needs_s: float = 0.0) -> object:
        """Enter what ``call`` returns, or the reason why it could not be measured; that is returned too.

        Args:
            key: of the entry.
            call: takes the measurement.
            needs_s: it is not begun where less time than this is left.
        """
        if self.left() < needs_s:
            value: object = f"{NOT_MEASURED}no time was left in the step's {self.limit_s:.0f} s"
        else:
            self.put(key, f"{NOT_MEASURED}it did not end within the step's {self.limit_s:.0f} s")
            try:
                value = call()
            except Exception as error:  # a peer that does not run is a finding, and the next one still counts
                value = NOT_MEASURED + one_line(error)
        self.put(key, value)
        return value


@dataclass
class Step:
    """One part of the run.

    Args:
        name: key of the JSON.
        budget_s: seconds; what earlier steps left over is added.
        must_pass: the run fails with it.
        command: arguments of the process; the step's JSON, the budget and the report's path are appended.
    """

    name: str
    budget_s: float
    must_pass: bool = False
    command: Sequence[str] = field(default_factory=tuple)


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process started, directly or not, and that still have their parent."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def end_tree(process: subprocess.Popen) -> None:
    """End a process that leads a session, with all that it started, sessions of their own included."""
    started = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_limited(command: Sequence[str], limit_s: float, log: Path, **options) -> int | None:
    """Exit code of a command whose output goes to ``log``; None where it was ended at the limit."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_tree(process)


def run_step(step: Step, limit_s: float, folder: Path, report: Path) -> dict[str, object]:
    """Run one step; its status, its seconds, and what it found until it ended or was ended.

    Args:
        step: what to run.
        limit_s: seconds until it is ended.
        folder: for the step's JSON and its log.
        report: the JSON of the run so far, which the step may read.
    """
    entries, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    start = time.monotonic()
    arguments = ["--step-out", str(entries), "--limit", f"{limit_s:.1f}", "--report", str(report)]
    code = run_limited([*step.command, *arguments], limit_s, log)
    status = {None: f"overran its {limit_s:.0f} s", 0: "done"}.get(code, f"failed with exit code {code}")
    result = json.loads(entries.read_text()) if entries.exists() else {}
    outcome = {"status": status, "seconds": round(time.monotonic() - start, 1), "result": result}
    if status != "done":
        outcome["log"] = log.read_text(errors="replace")[-ERROR_CHARACTERS:]
    return outcome


def run_steps(
    steps: Sequence[Step], report: dict, path: Path, folder: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Run the steps in order, writing the report after each; none ends the run.

    Args:
        steps: what to run; together they never take longer than their budgets' sum.
        report: the outcomes go under its key ``steps``.
        path: of the report.
        folder: for the steps' own files.
        say: is given a line as each step ends.
    """
    start, allowed = time.monotonic(), 0.0
    report["steps"] = {step.name: {"status": "cut off with the run"} for step in steps}  # until each has ended
    write_json(path, report)
    for step in steps:
        allowed += step.budget_s
        try:
            outcome = run_step(step, allowed - (time.monotonic() - start), folder, path)
        except Exception:  # the report must survive whatever a step does
            outcome = {"status": "failed", "log": traceback.format_exc()[-ERROR_CHARACTERS:], "result": {}}
        report["steps"][step.name] = outcome
        write_json(path, report)
        say(f"{step.name:<12} {outcome['status']}, {outcome.get('seconds', 0):.0f} s")


def failures(steps: Sequence[Step], report: dict) -> list[str]:
    """Names of the steps that the run fails with: not done, or with failures among their results."""
    failed = []
    for step in steps:
        outcome = report["steps"].get(step.name, {})
        if step.must_pass and (outcome.get("status") != "done" or outcome["result"].get("failed", 0)):
            failed.append(step.name)
    return failed
