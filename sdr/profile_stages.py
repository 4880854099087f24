"""Time and memory of each stage of a call, and its ranges in a trace: listeners to :mod:`sdr.stages`."""

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr.stages import OPTIMISER, START, listening
from sdr.timing import spin, synchronise

Segment = tuple[str, bool]  # a stage, and whether its backward pass
END = ("", False)


class Clock(NamedTuple):
    """now: a point in time, of any kind; between: seconds from one to another, once the device is idle."""

    now: Callable[[], object]
    between: Callable[[object, object], float]


def clock_of(device: torch.device) -> Clock:
    """The GPU's own time, by events in the stream; the wall clock on a CPU."""
    if device.type != "cuda":
        return Clock(time.perf_counter, lambda start, end: end - start)

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Clock(now, lambda start, end: start.elapsed_time(end) / 1e3)


def stage_times(
    call: Callable[[], object], device: torch.device, *, ahead_s: float = 0.0, clock: Clock | None = None
) -> dict[Segment, float]:
    """Seconds of each stage of one call; each moment of the call belongs to one stage, so that they sum to the call.

    Args:
        call: what runs the model.
        device: that it runs on.
        ahead_s: what launching takes; a GPU is kept busy for as long, so that its time has no gaps of launching.
        clock: another than the device's.
    """
    clock = clock or clock_of(device)
    marks: list[tuple[Segment, object]] = []
    synchronise(device)
    if device.type == "cuda" and ahead_s:
        spin(1.5 * ahead_s)
    with listening(lambda stage, backward: marks.append(((stage, backward), clock.now()))):
        call()
    marks.append((END, clock.now()))
    synchronise(device)
    times: dict[Segment, float] = {}
    for (segment, start), (_, end) in pairwise(marks):
        times[segment] = times.get(segment, 0.0) + clock.between(start, end)
    return times


def medians(passes: Iterable[Mapping[Segment, float]]) -> dict[Segment, float]:
    """Of each stage over several calls."""
    found: dict[Segment, list[float]] = {}
    for times in passes:
        for segment, seconds in times.items():
            found.setdefault(segment, []).append(seconds)
    return {segment: statistics.median(seconds) for segment, seconds in found.items()}


class Allocator(NamedTuple):
    """What a GPU's memory allocator says: bytes now, most bytes since the reset, and the reset."""

    now: Callable[[], int]
    peak: Callable[[], int]
    reset: Callable[[], None]


def allocator_of(device: torch.device) -> Allocator:
    functions = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    return Allocator(*(partial(function, device) for function in functions))


class StageMemory(NamedTuple):
    """Bytes that are allocated when a stage ends, for the last time, and most bytes while it runs."""

    allocated: int
    peak: int


def stage_memory(call: Callable[[], object], allocator: Allocator) -> dict[Segment, StageMemory]:
    """A GPU's memory in each stage of one call, with everything else that is allocated on it by this process."""
    found: dict[Segment, StageMemory] = {}
    running = [END]

    def turn(stage: str, backward: bool) -> None:
        before = running[0]
        if before != END:
            peak = max(allocator.peak(), found[before].peak if before in found else 0)
            found[before] = StageMemory(allocator.now(), peak)
        allocator.reset()
        running[0] = stage, backward

    with listening(turn):
        call()
        turn(*END)
    return found


def saved_bytes(call: Callable[[], object], model: nn.Module) -> dict[str, int]:
    """What autograd keeps for the backward pass by the stage that keeps it first; each storage once, no parameter."""
    parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    kept: dict[int, Tensor] = dict(parameters)  # alive, or another could take their addresses
    found: dict[str, int] = {}
    running: list[Segment] = [END]

    def turn(stage: str, backward: bool) -> None:
        running[0] = stage, backward
        if backward:  # nothing is kept any more, and what was is about to be freed
            kept.clear()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        stage, backward = running[0]
        if not backward and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            found[stage] = found.get(stage, 0) + storage.nbytes()
        return tensor

    with listening(turn), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return found


class Resident(NamedTuple):
    """Bytes of memory that this process holds, and the most that it has held since the last reset."""

    now: int
    peak: int


def reset_resident() -> bool:
    """Start to look for the peak anew; False where the system has no such thing."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
        return True
    return False


def resident() -> Resident | None:
    """None where the system does not say."""
    with suppress(OSError, KeyError), open("/proc/self/status") as file:
        rows = dict(line.split(":", 1) for line in file if ":" in line)
        return Resident(*(int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))
    return None


def range_name(stage: str, backward: bool) -> str:
    """As a trace shows it: "res2 forward", "optimiser"."""
    return stage if stage in (START, OPTIMISER) else f"{stage} {'backward' if backward else 'forward'}"


class Ranges:
    """A range of torch.profiler for each stage, and on a GPU one of NVTX, one after the other.

    A GPU's backward pass runs on a thread of its own, and a range must end on the thread that it began on.

    Args:
        device: that the model runs on.
        nvtx: has ``range_start`` and ``range_end``; None makes no such ranges.
    """

    def __init__(self, device: torch.device, nvtx: object | None = None) -> None:
        self.device, self.nvtx = device, nvtx
        self.main = threading.get_ident()
        self._open: dict[int, torch.profiler.record_function] = {}
        self._nvtx_range: object | None = None

    def __call__(self, stage: str, backward: bool) -> None:
        thread = threading.get_ident()
        first = thread not in self._open
        # the thread that asks a GPU's thread for gradients only waits
        waits = backward and thread == self.main and self.device.type == "cuda"
        name = "backward" if waits else range_name(stage, backward)
        if not first and self._open[thread].name == name:
            return
        self.close(thread)
        self._open[thread] = torch.profiler.record_function(name)
        self._open[thread].__enter__()
        if first and thread != self.main:
            self.at_end(partial(self.close, thread))
        if self.nvtx is not None:
            self.close_nvtx()
            self._nvtx_range = self.nvtx.range_start(name)

    @staticmethod
    def at_end(call: Callable[[], None]) -> None:
        """Call once the backward pass is over, on the thread that ran it."""
        torch.autograd.Variable._execution_engine.queue_callback(call)

    def close(self, thread: int) -> None:
        """End the range that is open on this thread."""
        if thread in self._open:
            self._open.pop(thread).__exit__(None, None, None)

    def close_nvtx(self) -> None:
        if self._nvtx_range is not None:
            self.nvtx.range_end(self._nvtx_range)
            self._nvtx_range = None


@contextmanager
def ranges(device: torch.device) -> Iterator[None]:
    """Ranges of the stages of whatever runs in the block."""
    marks = Ranges(device, torch.cuda.nvtx if device.type == "cuda" else None)
    with listening(marks):
        try:
            yield
        finally:
            marks.close(marks.main)
            marks.close_nvtx()
