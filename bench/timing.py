"""``time_op``: the one way in which a benchmark is timed, after its answer was checked.

Every round flushes the cache, times the baseline, flushes again, times the call (what pytest-benchmark reports) and,
where it is short, times it once more on what it has just read (warm). So baseline and call meet the same noise, and the
ratio is the median over pairs. On a GPU the stamps are CUDA events behind a busy wait, so that Python's own time does
not count; on a CPU one thread is pinned to one core unless the row says otherwise.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from answers import Call, Check, in_float64, matches
from inputs import tensors_of
from torch import Tensor
from turns import fixed_rounds, take_turn

from sdr.layers import Work
from sdr.timing import Ceilings, cache_bytes, measure_ceilings, spin, synchronise

MIN_ROUNDS, MAX_ROUNDS = 5, 100
LIMIT_S = 2.0  # of one benchmark's rounds, where five take less
WARM_S = 0.3  # a longer call empties the cache itself
SPIN_S = 1e-3  # more than launching took, so that the launches are queued


@dataclass(frozen=True)
class Moved(Work):
    """Work of so many FLOPs, and bytes with every input, weight and output moved once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """What a figure needs to mean something.

    Args:
        subject: what is timed and compared, as "res3.1, 1 clip x 4 branches".
        op: of sdr_kernels, or "model", "training step", "views", "loader", "decode", "first result".
        impl: "reference", "cpu", "triton", "cuda", or a peer's name.
        work: what has to be done at least, part by part; none where it is not known.
        clips: that a call handles; 0 where there are none.
        baseline: name of what is timed in turns; "" is nothing.
        threads: of a CPU; one is pinned to a core.
        wall: the wall clock on a GPU too, as a caller who waits for the result sees it.
        dtype: that arithmetic is done in, as "bfloat16"; "" is the inputs'.
        whole: a process or a pipeline, with state of its own: neither flushed before nor timed warm.
        limit_s: of the rounds.
    """

    subject: str
    op: str
    impl: str
    work: Sequence[Work] = ()
    clips: int = 0
    baseline: str = "reference"
    threads: int = 1
    wall: bool = False
    dtype: str = ""
    whole: bool = False
    limit_s: float = LIMIT_S


@dataclass
class Stamp:
    """A moment on the GPU; the difference of two is seconds, and waits for the later one."""

    event: "torch.cuda.Event"

    def __sub__(self, earlier: "Stamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass
class Clock:
    """pytest-benchmark's timer: the wall clock, or moments of the GPU while ``event`` makes them."""

    event: Callable[[], "torch.cuda.Event"] | None = None
    __name__: str = field(default="sdr_clock", repr=False)

    def __call__(self) -> float | Stamp:
        if self.event is None:
            return time.perf_counter()
        event = self.event()
        event.record()
        return Stamp(event)

    @contextmanager
    def by(self, event: Callable[[], "torch.cuda.Event"] | None) -> Iterator[None]:
        self.event = event
        try:
            yield
        finally:
            self.event = None


CLOCK = Clock()


@cache
def ceilings(device: torch.device, threads: int) -> Ceilings:
    """Both ceilings of this machine, measured once a session; some seconds."""
    with cpu_threads(device, threads):
        return measure_ceilings(device)


@cache
def flusher(device: torch.device) -> Tensor:
    sizes = 2 if device.type == "cuda" else 1
    return torch.empty(sizes * cache_bytes(device), dtype=torch.uint8, device=device)


def flush(device: torch.device) -> None:
    """Leave nothing of an earlier call in the cache."""
    flusher(device).zero_()


@contextmanager
def cpu_threads(device: torch.device, threads: int) -> Iterator[None]:
    """So many threads of torch, a single one pinned to a core; afterwards all is as it was."""
    if device.type != "cpu":
        yield
        return
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(threads)
    if threads == 1:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


def rounds_for(once_s: float, limit_s: float) -> int:
    """As many as a comparison asks for, else what the limit allows, at least five."""
    return fixed_rounds() or max(MIN_ROUNDS, min(MAX_ROUNDS, int(limit_s / once_s)))


def waiting(call: Call, device: torch.device) -> Call:
    """The call until the device is idle again."""

    def run(*inputs: object) -> object:
        result = call(*inputs)
        synchronise(device)
        return result

    return run


@torch.no_grad()
def time_op(
    benchmark,
    call: Call,
    reference: Call | None,
    inputs: Sequence[object],
    row: Row,
    *,
    check: Check | None = None,
    baseline: Call | None = None,
) -> None:
    """Check a call's answer, then time it and what it is compared with, and record what the figures need.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: takes ``inputs``; one that needs gradients turns them on.
        reference: the definition, which takes ``inputs``; timed in turns where no other baseline is given. Without one
            ``check`` is needed, and nothing is timed beside the call.
        inputs: tensors on one device, in any nesting.
        row: what is recorded.
        check: of the result, in place of the comparison with ``reference`` in float64.
        baseline: timed in turns instead of ``reference``; the row names it.

    Raises:
        WrongAnswerError: the answer is wrong; nothing has been timed.
    """
    device = next((t.device for t in tensors_of(inputs)), torch.device("cpu"))
    with cpu_threads(device, row.threads):
        if check is None:
            check = matches(in_float64(reference)(*inputs), reference(*inputs))
        if benchmark.disabled:
            check(benchmark.pedantic(call, args=inputs))
            return
        check(call(*inputs))
        del check  # and the truth with it, which can be large
        other = None if row.baseline in ("", row.impl) else baseline or reference
        times = run_rounds(benchmark, call, other, inputs, row, device)
    record(benchmark, times, inputs, row, device)


def run_rounds(
    benchmark, call: Call, baseline: Call | None, inputs: Sequence[object], row: Row, device: torch.device
) -> dict[str, list[float] | int]:
    """Seconds of the baseline and of warm calls, round by round; cold calls' are pytest-benchmark's own."""
    gpu = device.type == "cuda"
    comparing = fixed_rounds() is not None  # the other side is the baseline then
    others = [baseline] if baseline and not comparing else []
    if row.wall and gpu:
        call, others = waiting(call, device), [waiting(other, device) for other in others]
    clock = partial(torch.cuda.Event, enable_timing=True) if gpu and not row.wall else None
    seconds: dict[str, list[float] | int] = {"baseline": [], "warm": []}
    launch_s = once_s = call_s = 0.0
    for one in (*others, call):  # warm: the check called each once, and some libraries choose at the second call
        start = time.perf_counter()
        if not row.whole:
            flush(device)
        one(*inputs)
        launch_s = max(launch_s, time.perf_counter() - start)
        synchronise(device)
        call_s = time.perf_counter() - start
        once_s += call_s
    warms = not comparing and not row.whole and call_s < WARM_S
    if gpu:
        seconds["peak_bytes"] = peak_bytes(partial(call, *inputs))

    def queued() -> None:
        if clock:
            spin(1.5 * launch_s + SPIN_S)

    def timed(one: Call) -> float:
        queued()
        start = CLOCK()
        one(*inputs)
        return CLOCK() - start

    def before() -> None:
        take_turn()
        for other in others:
            if not row.whole:
                flush(device)
            seconds["baseline"].append(timed(other))
        if not row.whole:
            flush(device)
        queued()

    def after(*_: object) -> None:
        if warms:
            seconds["warm"].append(timed(call))

    rounds = rounds_for(once_s, row.limit_s)
    with CLOCK.by(clock):
        benchmark.pedantic(call, args=inputs, setup=before, teardown=after, rounds=rounds)
    return seconds


def peak_bytes(call: Call) -> int:
    """The most memory that a call takes on the GPU beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    first, middle, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / middle


def record(benchmark, times: dict[str, list[float] | int], inputs: object, row: Row, device: torch.device) -> None:
    """Enter all that the figures need into the benchmark's ``extra_info``."""
    ours = list(benchmark.stats.stats.data)
    median = statistics.median(ours)
    tensors = list(tensors_of(inputs))
    info = {"subject": row.subject, "op": row.op, "impl": row.impl}
    info |= {"shapes": [list(t.shape) for t in tensors], "dtype": row.dtype or dtype_of(tensors), "device": str(device)}
    info |= {"threads": row.threads if device.type == "cpu" else 0, "cold_median_s": median}
    if len(ours) > 1:
        info["spread"] = spread(ours)
    if times["warm"]:
        info["warm_median_s"] = statistics.median(times["warm"])
    if row.clips:
        info |= {"clips": row.clips, "clips_per_s": row.clips / median}
    if "peak_bytes" in times:
        info["peak_bytes"] = times["peak_bytes"]
    if times["baseline"]:
        ratios = [slow / fast for slow, fast in zip(times["baseline"], ours, strict=True)]
        base = {"impl": row.baseline, "median_s": statistics.median(times["baseline"])}
        info["baseline"] = base | {"ratio": statistics.median(ratios)}
    benchmark.extra_info.update(info | against_floor(row, info["dtype"], median, device))


def dtype_of(tensors: Sequence[Tensor]) -> str:
    """The first floating tensor's, as "bfloat16"; the first one's where none is; "" where there is none."""
    chosen = next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else None)
    return "" if chosen is None else str(chosen.dtype).removeprefix("torch.")


def against_floor(row: Row, dtype: str, seconds: float, device: torch.device) -> dict[str, object]:
    """FLOPs, bytes, and the least time that the measured ceilings allow, part by part; nothing where none is known."""
    if not row.work:
        return {}
    found: dict[str, object] = {name: sum(getattr(part, name) for part in row.work) for name in ("flops", "bytes")}
    if fixed_rounds() is not None:  # a comparison needs no ceilings
        return found
    top = ceilings(device, row.threads if device.type == "cpu" else 0)
    rates = top.flops_per_s.get(dtype, top.flops_per_s["float32"]), top.bytes_per_s
    floor = sum(part.floor(*rates) for part in row.work)
    bound = max(row.work, key=lambda part: part.floor(*rates)).bound(*rates)
    return found | {"floor_s": floor, "share_of_floor": floor / seconds, "bound": bound}
