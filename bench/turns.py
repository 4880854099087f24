"""Turns that a comparison gives to two processes, so that only one of them works at a time (bench/compare_trees.py).

The comparison names two pipes and the number of rounds in the environment. A turn lasts from the return of
:func:`take_turn` until its next call or the end of the process. Nothing here imports more than the standard library.
"""

import json
import os
import sys

VARIABLE = "SDR_BENCH_TURNS"  # "descriptor to read,descriptor to write,rounds"
PACKAGES = ("sdr", "sdr_kernels")  # what is compared: the comparison checks from where they came


def take_turn() -> None:
    """End this process's turn, if it has one, and wait for the next; returns at once where nothing is compared.

    Raises:
        RuntimeError: the comparison has ended.
    """
    if VARIABLE not in os.environ:
        return
    read, write, _ = _settings()
    origins = {name: getattr(sys.modules.get(name), "__file__", None) for name in PACKAGES}
    try:
        os.write(write, json.dumps(origins).encode() + b"\n")
        granted = os.read(read, 1)
    except BrokenPipeError:
        granted = b""
    if not granted:
        raise RuntimeError("the comparison ended before this benchmark did")


def fixed_rounds() -> int | None:
    """Rounds that a comparison asks of the benchmark; None where nothing is compared."""
    return _settings()[2] if VARIABLE in os.environ else None


def _settings() -> tuple[int, int, int]:
    read, write, rounds = (int(part) for part in os.environ[VARIABLE].split(","))
    return read, write, rounds
