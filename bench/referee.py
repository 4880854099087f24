"""One benchmark in two trees at once: a pytest process in each, which take turns (bench/turns.py)."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ledger import end_tree
from turns import PACKAGES, VARIABLE

PREPARE_S = 300.0  # until a process must have asked for its first turn, checks and warm-up included
EXIT_S = 120.0  # until a process that may go on has ended
# pytest-benchmark warns where its only benchmark was skipped or failed; as an error that would hide why
QUIET = ("-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning", "-p", "no:cacheprovider", "-q")
PYTEST = (sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "--benchmark", *QUIET)


class FailedError(Exception):
    """The benchmark's own check or code failed in a tree, or it measured another tree's code."""


class NotComparedError(Exception):
    """The benchmark cannot be compared here, for a reason that is no fault."""


def environment(tree: Path) -> dict[str, str]:
    """For a pytest of its own in ``tree``, whose packages it imports, whatever pytest this runs under."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return inherited | alone | {"PYTHONPATH": str(tree)}


class Side:
    """A tree's process.

    Args:
        label: "base" or "new".
        tree: root of the tree.
        name: of the benchmark, pytest's id.
        rounds: that the benchmark is asked for.
        folder: for its log and its JSON.
    """

    def __init__(self, label: str, tree: Path, name: str, rounds: int, folder: Path) -> None:
        self.label, self.tree = label, tree
        self.log, self.json = folder / f"{label}.log", folder / f"{label}.json"
        asked, ask = os.pipe()
        may, self.grant = os.pipe()
        self.asked = os.fdopen(asked, "rb")
        self.waiting = False  # for a turn
        command = [*PYTEST, name, "--benchmark-json", str(self.json)]
        variables = environment(tree) | {VARIABLE: f"{may},{ask},{rounds}"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=tree,
                env=variables,
                pass_fds=(may, ask),
            )
        os.close(may)
        os.close(ask)

    def wait(self, limit_s: float) -> None:
        """Until it asks for a turn or has ended; ``waiting`` says which."""
        ready, _, _ = select.select([self.asked], [], [], limit_s)
        if not ready:
            raise NotComparedError(f"{self.label}: nothing was heard of it for {limit_s:.0f} s")
        line = self.asked.readline()  # whole: it was written at once, and no other follows before a turn is granted
        self.waiting = bool(line)
        if line:
            self.check_origin(json.loads(line))
        elif self.process.wait(EXIT_S) != 0:
            raise FailedError(f"{self.label}: {failure(self.log)}")

    def check_origin(self, origins: dict[str, str | None]) -> None:
        """The tree's own packages must be what is timed."""
        for name in PACKAGES:
            origin = origins.get(name)
            if origin is not None and Path(origin).resolve().parent != (self.tree / name).resolve():
                raise FailedError(
                    f"{self.label}: imported {name} from {Path(origin).parent}, not from {self.tree / name}"
                )

    def turn(self, limit_s: float) -> float:
        """Let it work until it asks again or has ended; its seconds, 0 where it had ended before."""
        if not self.waiting:
            return 0.0
        start = time.monotonic()
        os.write(self.grant, b"g")
        self.wait(limit_s)
        return time.monotonic() - start if self.waiting else 0.0

    def times(self) -> list[float]:
        """Seconds of every round, in order."""
        text = self.json.read_text() if self.json.exists() else ""
        found = json.loads(text)["benchmarks"] if text else []
        if not found:
            raise NotComparedError(f"{self.label}: {skip(self.log)}")
        return found[0]["stats"]["data"]

    def machine(self) -> dict:
        """The stamp that the tree's benchmarks record; empty where they record none."""
        return json.loads(self.json.read_text())["machine_info"].get("stamp", {})

    def close(self) -> None:
        """End it, if it has not ended, with all that it started."""
        self.asked.close()
        os.close(self.grant)
        end_tree(self.process)


def failure(log: Path) -> str:
    """Why pytest failed: its first error line, or the last that it printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (errors or lines[-1:] or ["ended without a word"])[0][:300]


def skip(log: Path) -> str:
    """Why pytest skipped it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("SKIPPED")]
    return lines[0].partition(": ")[2][:300] if lines else "nothing was timed"


def alternate(sides: Sequence[Side], longest_s: float) -> None:
    """A B B A A B ... until both have ended. Neither begins before both are ready: preparing would disturb the other.

    Raises:
        NotComparedError: a turn took more than ``longest_s`` seconds.
        FailedError: a process did.
    """
    for side in sides:
        side.wait(PREPARE_S)
    order = list(sides)
    while any(side.waiting for side in sides):
        for side in order:
            seconds = side.turn(max(EXIT_S, 10 * longest_s))
            if seconds > longest_s:
                raise NotComparedError(f"a round takes {seconds:.2g} s, more than --longest {longest_s:g}")
        order.reverse()


def run_pair(name: str, base: Path, new: Path, rounds: int, longest_s: float, folder: Path) -> tuple[list, list, dict]:
    """Seconds of each round in the base and in the new tree, which belong together one by one, and the machine's stamp.

    Args:
        name: of the benchmark.
        base: root of the tree to compare with.
        new: root of the tree that is judged.
        rounds: of the benchmark in each.
        longest_s: seconds that one turn may take.
        folder: an empty one for logs.

    Raises:
        FailedError: in a tree; the message begins with its label.
        NotComparedError: skipped, or too slow.
    """
    with contextlib.ExitStack() as stack:
        sides = []
        for label, tree in (("base", base), ("new", new)):
            sides.append(Side(label, tree, name, rounds, folder))
            stack.callback(sides[-1].close)
        alternate(sides, longest_s)
        base_s, new_s = (side.times() for side in sides)
        if not len(base_s) == len(new_s) == rounds:
            raise FailedError(f"{rounds} rounds were asked for, base took {len(base_s)} and new {len(new_s)}")
        return base_s, new_s, sides[1].machine()


def collect(tree: Path, paths: Sequence[str], expression: str) -> tuple[list[str], str]:
    """Names of the benchmarks in a tree that pytest would run, and why there are none, else empty."""
    command = [*PYTEST, "--collect-only", *paths, *(["-k", expression] if expression else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree, env=environment(tree))
    names = [line for line in done.stdout.splitlines() if "::" in line and line.startswith("bench")]
    if done.returncode == 0 and names:
        return names, ""
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("ERROR", "E  "))]
    return [], (errors or ["no benchmark matches"])[0].strip()
