"""Command lines of sdr in children that can be killed, starved and misled: forks of one process that imported PyTorch.

A test starts the process by ``commands``; run as a script it reads jobs, a line of JSON each. A job's preparations are
the functions here that its child calls first.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of unshare(2)


class Ended(NamedTuple):
    """A child's exit code, -9 for SIGKILL; what it printed, lines of progress left out; seconds that it took."""

    code: int
    lines: list[str]
    seconds: float


class Commands:
    """The process whose forks run the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _ask(self, **job) -> int:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *words: object, prepare: Sequence[Sequence[object]] = (), folder: Path | None = None) -> "Child":
        """Run ``sdr`` with these words in ``folder``, after the preparations: names of functions and arguments."""
        self.count += 1
        printed = self.folder / f"{self.count}.txt"
        job = {"words": list(map(str, words)), "prepare": [list(map(str, p)) for p in prepare], "printed": str(printed)}
        return Child(self, self._ask(start=job | {"folder": str(folder or self.folder)}), printed)

    def run(self, *words: object, **options) -> Ended:
        return self.start(*words, **options).wait()


class Child:
    def __init__(self, commands: Commands, pid: int, printed: Path) -> None:
        self.commands, self.pid, self.printed, self.began = commands, pid, printed, time.monotonic()

    def kill(self, number: int) -> None:
        """Send a signal; one that has ended already, and waits to be asked how, does not mind."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = self.commands._ask(wait=self.pid, modules=f"{self.printed}.modules")
        text = self.printed.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("all videos", "videos "))]
        return Ended(code, lines, time.monotonic() - self.began)


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    """The process; what its children print goes to ``folder``."""
    started = Commands(folder)
    try:
        yield started
    finally:
        started.process.stdin.close()
        started.process.wait()
        started.process.stdout.close()


# --- preparations ----------------------------------------------------------------------------------------------------


class StubDetector:
    """A face in the same place of every frame of 64 x 64, found at once."""

    name = "stub"

    def __init__(self, *arguments: object, **options: object) -> None:
        """Of sdr.detectors.load_detector."""

    def __call__(self, frame: np.ndarray):
        from sdr.detectors import Faces

        points = np.float32([[(20, 20), (44, 20), (32, 30), (22, 42), (42, 42)]])
        return Faces(np.float32([(8, 8, 56, 56)]), points, np.float32([0.9]))


def stub_detector() -> None:
    for module in ("sdr.detectors", "sdr.cutting", "sdr.prepare"):
        importlib.import_module(module).load_detector = StubDetector


def fork_workers() -> None:
    """`sdr prepare`'s workers as forks: what they do is the same, and PyTorch is not imported for each."""
    import multiprocessing

    import sdr.prepare

    sdr.prepare.get_context = lambda method: multiprocessing.get_context("fork")


def largest_file(size: str) -> None:
    """A limit on the size of a file stands for a full disk: the same kind of error, at the same place."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), most))


def private_mounts() -> None:
    if ctypes.CDLL(None).unshare(NEW_MOUNTS):
        raise OSError("mounts of its own are refused")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def read_only(folder: str) -> None:
    """Read-only as a disk is, for root too."""
    private_mounts()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def environment(name: str, value: str = "") -> None:
    """Set a variable, or remove it where there is no value."""
    os.environ.pop(name, None)
    if value:
        os.environ[name] = value


def vanish(path: str, suffix: str) -> None:
    """Remove a file as soon as the run has written the first of those with this suffix."""
    replace = os.replace

    def first(*arguments: object) -> None:
        replace(*arguments)
        if os.path.exists(path) and Path(arguments[1]).suffix == suffix:
            os.unlink(path)

    os.replace = first


def die(writes: str) -> None:
    """Be killed in the place of one of the renames."""
    replace, left = os.replace, [int(writes)]

    def until(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = until


def clock(seconds: str) -> None:
    """Set the clock forward, or back, for everything in Python that asks for the time of day."""
    now = time.time
    time.time = lambda: now() + float(seconds)


def unknown_user() -> None:
    """A user of whom the system knows nothing but a number, as containers have them."""
    import pwd

    def unknown(user: int) -> None:
        raise KeyError(user)

    pwd.getpwuid = unknown


def may_mount() -> bool:
    """Whether a process may make mounts of its own here."""
    code = "import forked; forked.private_mounts()"
    folder = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False).returncode == 0


# --- the script ------------------------------------------------------------------------------------------------------


def child(words: list[str], prepare: list[list[str]], printed: str, folder: str) -> int:
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        os.chdir(folder)
        for name, *arguments in prepare:
            globals()[name](*arguments)
        import torch

        from sdr.cli import main

        torch.set_num_threads(1)
        code = main(words)
        with suppress(OSError):  # of a disk that is full
            Path(f"{printed}.modules").write_text("\n".join(sorted(sys.modules)))
        return code
    except SystemExit as end:  # of the parser
        return end.code
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def learn(file: str) -> None:
    """Import what a child had to import, so that the next need not."""
    names = Path(file).read_text().splitlines() if os.path.exists(file) else []
    for name in set(names) - sys.modules.keys():
        with suppress(ImportError):  # made while the child ran
            importlib.import_module(name)


def serve() -> None:
    for module in ("sdr.cli", "sdr.prepare", "sdr.score_run", "jsonargparse", "safetensors.torch"):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a child that has not yet redirected its own answers nobody
    for line in sys.stdin:
        job = json.loads(line)
        if "start" in job:
            answer = os.fork()
            if answer == 0:
                os._exit(child(**job["start"]))
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
            learn(job["modules"])
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    serve()
