"""Faults planted in copies of this tree, each of which a test must catch: `make faults`.

Prints a line for each; `--out FILE` keeps them as JSON, words choose those whose description has one of them. Exit code
0: every fault was caught by its test, which passes without it; 1: one was not.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 400.0
FAILED = 1  # pytest's exit code where tests ran and some failed
PROCESSES = 2


def copy_tree(target: Path) -> None:
    """The files of this tree as they are now, with the built module where there is one."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    built = (os.fsencode(path.relative_to(ROOT)) for path in ROOT.glob("sdr_kernels/_C*.so"))
    for name in map(os.fsdecode, filter(None, (*names, *built))):
        if (ROOT / name).is_file():  # one that is deleted is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_test(tree: Path, test: str) -> int | None:
    """pytest's exit code; None where it did not end in time."""
    # without compiled files of Python: one of a moment ago would stand for a text of the same length
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    try:
        done = subprocess.run(
            [*command, *test.split()], cwd=tree, env=environment, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def verdict(fault: Fault, tree: Path) -> str:
    """ "caught", or why the fault does not count as that."""
    sound = run_test(tree, fault.test)
    if sound != 0:
        return f"its test does not pass without it: pytest ended with {sound}"
    path = tree / fault.file
    text = path.read_text()
    path.write_text(planted(fault, text))
    try:
        code = run_test(tree, fault.test)
    finally:
        path.write_text(text)
    caught = code == FAILED or (fault.may_crash and code == -signal.SIGSEGV)
    return "caught" if caught else f"not caught: pytest ended with {code}"


def planted(fault: Fault, text: str) -> str:
    """The file's text with the fault; raises ValueError where its place is not there or not the only one."""
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {text.count(fault.old)} places for the fault: {fault.what}")
    return text.replace(fault.old, fault.new)


def run_all(faults: Sequence[Fault]) -> list[dict[str, object]]:
    """Plant each fault in a copy of the tree; says how each ended as soon as it is known."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(PROCESSES):
            copy_tree(Path(folder) / str(i))
            trees.put(Path(folder) / str(i))

        def run(fault: Fault) -> dict[str, object]:
            tree, start = trees.get(), time.monotonic()
            try:
                outcome = verdict(fault, tree)
            finally:
                trees.put(tree)
            print(f"{outcome:8} {fault.what}  [{fault.test}, {time.monotonic() - start:.0f} s]", flush=True)
            return {"what": fault.what, "file": fault.file, "test": fault.test, "outcome": outcome}

        return list(pool.map(run, faults))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose description has one of these words")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.words or any(word in f.what for word in options.words)]
    if not chosen:
        parser.error(f"no fault's description has one of these words: {' '.join(options.words)}")
    results = run_all(chosen)
    caught = sum(result["outcome"] == "caught" for result in results)
    print(f"{caught} of {len(results)} planted faults caught")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if caught == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
