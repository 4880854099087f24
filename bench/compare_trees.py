"""Is this tree slower than another? Benchmark by benchmark, in paired rounds: `make compare BASE=commit`.

For each benchmark one pytest process runs in each tree, with that tree's own packages, and their rounds alternate
strictly, A B B A A B B A: whatever else the machine does meets both alike, and a steady drift cancels. Round i of one
and round i of the other are a pair, r_i = seconds of new / seconds of base.

The median ratio has an interval without any assumption about how times are distributed: of n independent pairs, the
number whose ratio is below the true median is binomial(n, 1/2), so that the k-th smallest and the k-th largest ratio
hold the median between them but for a probability of 2 P(binomial(n, 1/2) < k). The largest k is taken that keeps this
within (1 - level) / m for m benchmarks (Bonferroni), so that all m intervals hold their medians at once with
probability of at least the level. A benchmark is

* slower, a regression: its interval lies above 1 + tolerance;
* faster: its interval lies below 1 / (1 + tolerance);
* else "same within x %": the interval's farther end is x % away from 1.

What no number of pairs can average away is what a process has by chance for as long as it lives, such as where its
memory lies: some per cent for an op of microseconds. The tolerance is for that.

Exit code 0: no regression; 1: a regression; 2: bad usage, or a benchmark that fails, as with a wrong answer;
130: interrupted. Benchmarks that only one tree has, that are skipped, or whose rounds are long are named, not judged.
"""

import argparse
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ledger import write_json
from referee import FailedError, NotComparedError, collect, run_pair
from wording import in_units

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, TOLERANCE, LEVEL, LONGEST_S = 40, 0.05, 0.95, 1.0


class RefusedError(Exception):
    """What was asked for cannot be done."""


def least_pairs(alpha: float) -> int:
    """Pairs from which on an interval exists that misses with probability of at most ``alpha``."""
    return math.ceil(1 - math.log2(alpha))


def interval(ratios: Sequence[float], alpha: float) -> tuple[float, float]:
    """Two of the ratios, between which their true median lies but for a probability of at most ``alpha``.

    Raises:
        ValueError: too few ratios for that.
    """
    n, below, k = len(ratios), 0, 0  # below: of the 2^n equally likely outcomes, those with fewer than k below
    while 2 * (below + math.comb(n, k)) <= alpha * 2**n:
        below += math.comb(n, k)
        k += 1
    if k == 0:
        raise ValueError(f"ratios must be at least {least_pairs(alpha)} for alpha {alpha:g}, got {n}")
    ordered = sorted(ratios)
    return ordered[k - 1], ordered[n - k]


def judge(base_s: Sequence[float], new_s: Sequence[float], alpha: float, tolerance: float) -> dict[str, object]:
    """A benchmark's row: medians in seconds, median ratio, its interval, verdict."""
    ratios = [new / base for base, new in zip(base_s, new_s, strict=True)]
    low, high = interval(ratios, alpha)
    if low > 1 + tolerance:
        verdict = "slower"
    elif high < 1 / (1 + tolerance):
        verdict = "faster"
    else:
        verdict = f"same within {math.ceil(100 * max(high, 1 / low) - 100)} %"
    return {
        "base_s": statistics.median(base_s),
        "new_s": statistics.median(new_s),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "verdict": verdict,
    }


def git(*arguments: str) -> str:
    """What git prints, stripped; empty where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


@contextmanager
def base_tree(base: str) -> Iterator[tuple[Path, str]]:
    """Root of the tree to compare with, and its name: a folder as it is, or a commit in a worktree that is removed."""
    if Path(base).is_dir():
        yield Path(base).resolve(), str(Path(base).resolve())
        return
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    if not commit:
        raise RefusedError(f"{base!r} is neither a folder nor a commit of this repository")
    folder = Path(tempfile.mkdtemp(prefix="sdr_base_"))
    try:
        git("worktree", "add", "--detach", "--quiet", str(folder / "tree"), commit)
        for built in (ROOT / "sdr_kernels").glob("_C.*"):  # refused by the base where its sources differ
            shutil.copy(built, folder / "tree" / "sdr_kernels")
        yield folder / "tree", commit[:7]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        git("worktree", "prune")


def named(tree: Path) -> str:
    """The working tree's commit, or its folder where it has none."""
    commit = git("rev-parse", "--short=7", "HEAD")
    return f"{commit} and changes" if commit and git("status", "--porcelain", "-uno") else commit or str(tree)


def choose(options: argparse.Namespace, base: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the benchmarks that both trees have, and why others are not compared."""
    if not (base / "bench" / "turns.py").exists():
        raise RefusedError(f"{options.base} has no bench/turns.py: it is older than this command")
    for path in options.benchmarks:
        if not (ROOT / path.partition("::")[0]).exists():
            raise RefusedError(f"{path} is not in {ROOT}")
    wanted, problem = collect(ROOT, options.benchmarks, options.k)
    if problem:
        raise RefusedError(problem)
    there, problem = collect(base, ["bench"], "")
    if problem:
        raise RefusedError(f"base: {problem}")
    names = [name for name in wanted if name in there]
    if not names:
        raise RefusedError("base has none of these benchmarks")
    if options.rounds < (least := least_pairs((1 - LEVEL) / len(names))):
        raise RefusedError(f"--rounds must be at least {least} for {len(names)} benchmarks, got {options.rounds}")
    return names, {name: "base does not have it" for name in wanted if name not in there}


def compare(
    names: Sequence[str], base: Path, options: argparse.Namespace, step: Callable[[str], None]
) -> dict[str, dict]:
    """Rows, reasons of what could not be compared, failures, each by benchmark, and the machine's stamp."""
    found: dict[str, dict] = {"rows": {}, "not_compared": {}, "failed": {}, "machine": {}}
    for name in names:
        step(name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                pair = run_pair(name, base, ROOT, options.rounds, options.longest, Path(folder))
            except FailedError as error:
                found["failed"][name] = str(error)
            except NotComparedError as error:
                found["not_compared"][name] = str(error)
            else:
                base_s, new_s, found["machine"] = pair
                found["rows"][name] = judge(base_s, new_s, (1 - LEVEL) / len(names), options.tolerance)
    return found


def table(found: dict[str, dict]) -> str:
    """What was found as text, a line for each benchmark."""
    width = max(map(len, [*found["rows"], *found["not_compared"], *found["failed"], "benchmark"]))
    lines = [f"{'benchmark':<{width}}{'base':>10}{'new':>10}{'ratio':>8}  {'interval':<14}  verdict"]
    for name, row in found["rows"].items():
        times = f"{in_units(row['base_s']):>10}{in_units(row['new_s']):>10}{row['ratio']:>8.3f}"
        bounds = f"{row['low']:.3f}..{row['high']:.3f}"
        lines.append(f"{name:<{width}}{times}  {bounds:<14}  {row['verdict']}")
    lines += [f"{name:<{width}}  not compared: {why}" for name, why in found["not_compared"].items()]
    return "\n".join(lines + [f"{name:<{width}}  FAILED in {why}" for name, why in found["failed"].items()])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="commit or folder to compare this tree with")
    parser.add_argument("--benchmarks", nargs="+", default=["bench"], metavar="ID", help="pytest ids or files; all")
    parser.add_argument("-k", default="", metavar="EXPR", help="of these, those that match pytest's expression")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"pairs, an even number; {ROUNDS}")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"share of time; {TOLERANCE}")
    parser.add_argument("--longest", type=float, default=LONGEST_S, help=f"seconds of a round; {LONGEST_S:g}")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args(arguments)
    if not options.base:
        parser.error("BASE=, a commit or folder, is missing")
    for name in ("rounds", "tolerance", "longest"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} must be positive")
    return options


def run(options: argparse.Namespace) -> int:
    """Compare, print, write; the exit code."""
    from sdr.terminal import progress_bars

    if options.rounds % 2:
        raise RefusedError(f"--rounds must be even, got {options.rounds}: the order is A B B A")
    if options.json and not (options.json.parent.is_dir() and os.access(options.json.parent, os.W_OK)):
        raise RefusedError(f"--json must lie in a folder that can be written to, got {options.json}")
    with base_tree(options.base) as (base, base_name):
        names, missing = choose(options, base)
        with progress_bars() as bars:
            bar = bars.add_task("comparing", total=len(names))
            done = iter(range(len(names)))
            found = compare(names, base, options, lambda name: bars.update(bar, completed=next(done), description=name))
            bars.update(bar, completed=len(names), description="compared")
    found["not_compared"] |= missing
    print(f"new: {named(ROOT)}; base: {base_name}; {options.rounds} pairs of rounds each\n{table(found)}")
    slower = [name for name, row in found["rows"].items() if row["verdict"] == "slower"]
    limit = f"more than {100 * options.tolerance:g} %"
    print(f"slower by {limit}: {', '.join(slower) or 'none'}; failed: {', '.join(found['failed']) or 'none'}")
    if options.json:
        settings = {"rounds": options.rounds, "tolerance": options.tolerance, "level": LEVEL}
        report = {"base": base_name, "new": named(ROOT), **settings, **found}
        write_json(options.json, report)
    return 2 if found["failed"] or not found["rows"] else 1 if slower else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an outer time limit ends it as Ctrl-C does
    try:
        return run(options)
    except RefusedError as error:
        print(f"make compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
