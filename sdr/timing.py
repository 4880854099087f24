"""How time is taken on a GPU and on a CPU, and what the machine at hand can do at most."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

REPEATS = 20
MAX_SETS = 64  # inputs below about 2 MB stay in the cache, as they do in the model
MATMUL = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
# launches are queued behind a busy wait, so that events see the GPU's time and not Python's
SPIN_CYCLES_PER_S = 2_000_000_000  # at the boost clock; a slower clock waits longer, which does no harm
MAX_SPIN_S = 0.2
CPU_CACHE_BYTES = 64 << 20  # what a last level holds that one of many guests can have; some have less

Call = Callable[[], object]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spin(seconds: float) -> None:
    """Keep the GPU busy for a while, at most 0.2 s, so that what is launched meanwhile runs without gaps."""
    torch.cuda._sleep(int(min(MAX_SPIN_S, seconds) * SPIN_CYCLES_PER_S))


def wall_times(call: Call, device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Seconds from the call until the device is idle again: what a caller who waits for one result sees."""
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return times


def device_times(calls: Sequence[Call], repeats: int = REPEATS) -> list[float]:
    """Seconds of GPU time of each call, by CUDA events, with the launches queued ahead of the GPU."""
    start = time.perf_counter()
    calls[0]()
    launch = time.perf_counter() - start
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    spin(1.5 * repeats * launch + 1e-3)
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
    calls: Call | Sequence[Call],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    limit_s: float = float("inf"),
    wall: bool = False,
) -> dict[str, float | int]:
    """Warm up, then time; several calls take turns, so that none finds its input in the cache.

    Args:
        calls: the same work on one or several sets of inputs.
        device: a CPU is timed by the wall clock.
        repeats: number of timed calls.
        limit_s: fewer calls, at least 5, where all would take more than this many seconds; one where one does.
        wall: time by the wall clock on a GPU too.
    """
    calls = [calls] if callable(calls) else list(calls)
    for call in (*calls, calls[0]):  # once more: some libraries choose at the second call
        call()
    once = wall_times(calls[0], device, 1)[0]
    if once > limit_s:
        return summary([once])
    repeats = int(min(repeats, max(5, limit_s / once)))
    if device.type == "cuda" and not wall:
        return summary(device_times(calls, repeats))
    return summary(wall_times(calls[0], device, repeats))


def cpu_name() -> str:
    """The CPU's model as Linux tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.machine()


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache; on a CPU what is taken to hold its last level."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_CACHE_BYTES


def rotation(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of this size it takes until the first has left the cache; 64 where it takes more."""
    return 1 if nbytes > 4 * cache_bytes(device) else min(MAX_SETS, 2 + 2 * cache_bytes(device) // nbytes)


class Ceilings(NamedTuple):
    """What a machine does at most: the two ceilings of the roofline."""

    flops_per_s: dict[str, float]  # of a square matrix product, by dtype as "bfloat16"
    bytes_per_s: float  # of a copy, read and written
    threads: int  # of a CPU, that both were measured with; 0 for a GPU

    def rates(self, dtype: torch.dtype) -> tuple[float, float]:
        """FLOP/s in this dtype, and bytes/s."""
        return self.flops_per_s[str(dtype).removeprefix("torch.")], self.bytes_per_s

    def ridge(self, dtype: torch.dtype) -> float:
        """FLOPs for each byte from which on arithmetic bounds, and not memory."""
        return self.rates(dtype)[0] / self.bytes_per_s


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    *,
    shrink: int = 1,
    say: Callable[[str], None] = lambda what: None,
) -> Ceilings:
    """Time a matrix product in each dtype and a copy, each the median of 20; some seconds.

    Args:
        device: a CPU with as many threads as torch has now.
        dtypes: of the products; float32 without TF32, as torch is set up.
        shrink: sizes are divided by this, for a trial whose figures mean nothing.
        say: is told what is measured next.
    """
    size, nbytes = MATMUL[device.type] // shrink, COPY_BYTES[device.type] // shrink
    if device.type == "cuda":
        nbytes = min(nbytes, torch.cuda.mem_get_info(device)[0] // 4)  # source and target, and room beside them
    rates = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        say(f"matrix product in {name}")
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # zeros would run faster
        rates[name] = 2 * size**3 / measure(lambda a=a, b=b: a @ b, device)["median_s"]
    say("copy")
    source: Tensor = torch.randint(0, 256, (nbytes // 8,), device=device, dtype=torch.int64)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Ceilings(rates, 2 * nbytes / copy["median_s"], threads)
