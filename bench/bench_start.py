"""Cold start: from starting Python to the model's first logit, each time in a process of its own."""

import math
from itertools import count
from pathlib import Path

import pytest
import torch
from answers import WrongAnswerError
from machine import SMALL
from timing import Row, time_op
from timings import first_result

KIND = "cuda" if torch.cuda.is_available() else "cpu"
# kernels are compiled and cached on a GPU alone
CACHES = ["empty cache", "warm cache"] if KIND == "cuda" else ["warm cache"]


def check(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise WrongAnswerError(f"{seconds} seconds")


@pytest.mark.parametrize("cache", CACHES)
def bench_first_result(benchmark, tmp_path, cache, device, small):
    impl = "triton" if KIND == "cuda" else "cpu"
    subject = f"import to first result, ftcn_released, 1 clip x 4 branches, {cache}"
    dtype = "bfloat16" if KIND == "cuda" else "float32"
    row = Row(subject, "first result", impl, clips=1, whole=True, wall=True, baseline="", threads=2, dtype=dtype)
    folders = count()

    def call() -> float:
        folder = Path(tmp_path / (str(next(folders)) if cache == "empty cache" else "warm"))
        return first_result(folder, device, SMALL if small else {})

    time_op(benchmark, call, None, (), row, check=check)
