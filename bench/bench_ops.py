"""Every public op of sdr_kernels at the sizes that the model has, in every implementation that runs here.

The reference is timed in turns with each, and has a row of its own where nothing else runs. On a CPU in float32, one
clip of one branch, on one pinned thread (the chain of bottlenecks on two); on a GPU in bfloat16, the paper's batch and
one clip of four branches.
"""

from functools import lru_cache, partial

import pytest
import torch
from answers import Check, in_float64, matches
from cases import Built, Case, Sizes, cases, impls_of, of_clips, why_not_here
from ledger import NOT_MEASURED
from timing import Row, cpu_threads, time_op

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def rows_of(op: str) -> list[str]:
    """Implementations that have a row."""
    reference, *others = impls_of(op)
    measured = any(not why_not_here(op, impl, torch.device(KIND)) for impl in others)
    return others if measured else [reference, *others]


ROWS = {f"{case.name}-{impl}": (case, impl) for case in cases(KIND) for impl in rows_of(case.op)}


@lru_cache(1)  # the rows of one case follow each other
@torch.no_grad()
def checked(case: Case, sizes: Sizes, device: torch.device) -> tuple[Built, Check]:
    """The case in memory, and the check of its answer against float64."""
    torch.manual_seed(0)
    built = case.build(sizes, device, DTYPE[KIND])
    reference = partial(built.function, impl="reference")
    with cpu_threads(device, case.threads):
        truth = (built.exact or in_float64(reference))(*built.inputs)
        return built, matches(truth, reference(*built.inputs), ties=case.ties)


@pytest.mark.parametrize(("case", "impl"), ROWS.values(), ids=ROWS)
def bench_op(benchmark, case, impl, device, small):
    if reason := why_not_here(case.op, impl, device):
        pytest.skip(f"{NOT_MEASURED}{reason}")
    built, check = checked(case, Sizes(KIND, small), device)
    subject = of_clips(case.name, built.clips, built.branches)
    row = Row(subject, case.op, impl, built.work, built.clips, threads=case.threads)
    call, reference = (partial(built.function, impl=name) for name in (impl, "reference"))
    time_op(benchmark, call, reference, built.inputs, row, check=check)
