"""How many random cases the tests of the promises draw, and from what seed, so that each can be drawn again alone.

CI runs few, `make soak` all. A failure names the command that repeats its case.
"""

import os
import zlib
from collections.abc import Iterator

import numpy as np

SEED = int(os.environ.get("SDR_SEED", "0"))
ONLY = os.environ.get("SDR_ONLY")  # number of the one case to run
FILES = int(os.environ.get("SDR_FILES", "40"))  # mutated videos
CASES = int(os.environ.get("SDR_CASES", "4"))  # of each op and dtype
CHECKPOINTS = int(os.environ.get("SDR_CHECKPOINTS", "300"))  # mutated checkpoints, and configuration files
KILLS = int(os.environ.get("SDR_KILLS", "10"))  # of a run of training
CLIPS = int(os.environ.get("SDR_CLIPS", "60"))  # scored in one process


def numbers(count: int) -> Iterator[int]:
    """0 .. count - 1, or the one that SDR_ONLY names."""
    return iter(range(count) if ONLY is None else [int(ONLY)])


def draw(kind: str, number: int) -> np.random.Generator:
    """The generator of one case; depends on nothing but SDR_SEED and the arguments."""
    return np.random.default_rng([SEED, zlib.crc32(kind.encode()), number])


def replay(test: str, number: int) -> str:
    """The command that runs case ``number`` alone. ``test``: a file of tests, and what else pytest needs to choose."""
    return f"SDR_SEED={SEED} SDR_ONLY={number} pytest {test}"
