"""What a machine with a GPU can tell about this repository, in one command and under 10 minutes: `make gpu`.

Needs torch, triton, numpy and pytest, and the repository's root in PYTHONPATH. Each step runs in a process of its own
with a time budget; one that fails or overruns is recorded and the next goes on. Exit code 0: done; 1: a check failed;
2: there is no GPU, or a package is missing; 130: interrupted, and what was done is kept.
"""

import argparse
import os
import signal
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ledger import Ledger, Step, failures, run_steps, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NEEDED = ("torch", "triton", "numpy", "pytest")
# module of bench/, seconds, whether the run fails with it; together under 10 minutes
STEPS = (
    ("correctness", 195.0, True),
    ("sanitizer", 80.0, True),
    ("ceilings", 10.0, False),
    ("timings", 95.0, False),
    ("losses", 20.0, False),
    ("views", 35.0, False),
    ("training", 75.0, True),
    ("peers", 50.0, False),
    ("profiling", 20.0, False),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the JSON; {RESULTS.relative_to(ROOT)} where not given")
    parser.add_argument("--commit", help="names the code where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: executes, measures nothing")
    parser.add_argument("--steps", nargs="+", choices=[name for name, *_ in STEPS], help="only these steps")
    internal = parser.add_argument_group("used by the command itself")
    internal.add_argument("--sanitize-shapes", nargs="*", metavar="OP:DTYPE", help="run ops once on small odd shapes")
    internal.add_argument("--step", choices=[name for name, *_ in STEPS], help="run this one here")
    internal.add_argument("--step-out", type=Path)
    internal.add_argument("--limit", type=float)
    internal.add_argument("--report", type=Path)
    return parser.parse_args(arguments)


def why_not(options: argparse.Namespace) -> str:
    """Empty where the command can run here, else the reason in one line."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        packages = " ".join(missing)
        return f"{sys.executable} has no {', '.join(missing)}: pip install -c constraints.txt {packages}"
    if options.rehearse:
        inside = options.out is not None and options.out.resolve().is_relative_to(RESULTS)
        return f"a rehearsal is no result: --out must lie outside {RESULTS}" if inside else ""
    return import_module("machine").why_no_gpu()


def run_all(options: argparse.Namespace, folder: Path) -> int:
    """Every step, the table and the JSON; the exit code.

    Args:
        options: of the command line.
        folder: for the steps' own files.
    """
    machine, summary = import_module("machine"), import_module("summary")
    command = [sys.executable, str(Path(__file__)), *["--rehearse"] * options.rehearse, "--step"]
    chosen = [step for step in STEPS if options.steps is None or step[0] in options.steps]
    steps = [Step(name, budget_s, must_pass, (*command, name)) for name, budget_s, must_pass in chosen]
    stamp = machine.stamp(options.commit)
    report = {"rehearsal": options.rehearse, "stamp": stamp, "steps": {}, "failed": [], "summary": []}
    out = options.out or (Path(tempfile.mkdtemp(prefix="sdr_rehearsal_")) if options.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / machine.file_name(stamp)
    interrupted = False
    try:
        run_steps(steps, report, path, folder, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        interrupted = True
    report["failed"] = failures(steps, report)
    report["summary"] = summary.summarise({name: step.get("result", {}) for name, step in report["steps"].items()})
    write_json(path, report)
    print(summary.table(report))
    print(f"failed: {', '.join(report['failed']) or 'nothing'}; results: {path}")
    return 130 if interrupted else 1 if report["failed"] else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.sanitize_shapes is not None:
        return import_module("sanitizer").main(options.sanitize_shapes, options.rehearse)
    if options.step is not None:
        machine = import_module("machine").Machine(options.rehearse, options.report)
        import_module(options.step).run(Ledger(options.step_out, options.limit), machine)
        return 0
    problem = why_not(options)
    if problem:
        print(f"make gpu: {problem}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an outer time limit ends it as Ctrl-C does
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        return run_all(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
