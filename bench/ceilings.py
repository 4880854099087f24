"""How time is taken on a GPU, and what the GPU at hand can do at most."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from ledger import Ledger
from machine import Machine
from torch import Tensor

REPEATS = 20
REHEARSED = 3  # on a CPU, where no time means anything
MATMUL = 8192
MAX_SETS = 64  # inputs below about 2 MB stay in the cache, as they do in the model
COPY_BYTES = 4 << 30
# launches are queued behind a busy wait, so that events see the GPU's time and not Python's
SPIN_CYCLES_PER_S = 2_000_000_000  # at the boost clock; a slower clock waits longer, which does no harm
MAX_SPIN_S = 0.2


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_times(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Seconds from the call until the device is idle again: what a caller who waits for one result sees."""
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return times


def device_times(calls: Sequence[Callable[[], object]], repeats: int = REPEATS) -> list[float]:
    """Seconds of GPU time of each call, by CUDA events, with the launches queued ahead of the GPU."""
    start = time.perf_counter()
    calls[0]()
    launch = time.perf_counter() - start
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(int(min(MAX_SPIN_S, 1.5 * repeats * launch + 1e-3) * SPIN_CYCLES_PER_S))
    events[0].record()
    for i in range(repeats):
        calls[i % len(calls)]()
        events[i + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """Median, fastest and slowest in seconds, and how many there were."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "repeats": len(times)}


@torch.inference_mode()
def measure(
    calls: Callable[[], object] | Sequence[Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    limit_s: float = float("inf"),
    wall: bool = False,
) -> dict[str, float | int]:
    """Warm up, then time; several calls take turns, so that none finds its input in the cache.

    Args:
        calls: the same work on one or several sets of inputs.
        device: a CPU is timed by the wall clock, which serves the rehearsal.
        repeats: number of timed calls.
        limit_s: fewer calls, at least 5, where all would take more than this many seconds; one where one does.
        wall: time by the wall clock on a GPU too.
    """
    calls = [calls] if callable(calls) else list(calls)
    for call in (*calls, calls[0]):  # once more: some libraries choose at the second call
        call()
    if device.type == "cpu":
        repeats = REHEARSED
    once = wall_times(calls[0], device, 1)[0]
    if once > limit_s:
        return summary([once])
    repeats = int(min(repeats, max(5, limit_s / once)))
    if device.type == "cuda" and not wall:
        return summary(device_times(calls, repeats))
    return summary(wall_times(calls[0], device, repeats))


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache; on a CPU a token size."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 16


def rotation(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of this size it takes until the first has left the cache; 64 where it takes more."""
    return 1 if nbytes > 4 * cache_bytes(device) else min(MAX_SETS, 2 + 2 * cache_bytes(device) // nbytes)


def measure_ceilings(device: torch.device) -> dict[str, object]:
    """bf16 matrix product in FLOP/s and copy in bytes/s (read and written), each the median of 20."""
    cpu = device.type == "cpu"
    size, nbytes = (128, 1 << 20) if cpu else (MATMUL, COPY_BYTES)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))  # zeros would run faster
    product = measure(lambda: a @ b, device)
    source: Tensor = torch.randint(0, 256, (nbytes // 8,), device=device, dtype=torch.int64)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    return {
        "matmul_flops_per_s": 2 * size**3 / product["median_s"],
        "matmul": {"shape": [size, size, size], "dtype": "bfloat16", **product},
        "copy_bytes_per_s": 2 * nbytes / copy["median_s"],
        "copy": {"bytes": nbytes, **copy},
        "l2_bytes": cache_bytes(device),
    }


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter the ceilings, which the floors of later steps are computed from."""
    ledger.attempt("ceilings", lambda: measure_ceilings(machine.device))
