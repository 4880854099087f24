"""Which kernels a call spends its time in, by torch.profiler; on a CPU, which operators.

On a CPU an operator's time is its own, without that of the operators that it calls, summed over threads. Our ops are
left out of these where there are several threads, for which they only wait; by op their times are inclusive, by the
wall clock.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from sdr.layers import Layer
from sdr.timing import synchronise

PASSES = 3
OURS = "sdr_kernels::"
HEAD = ("norm_linear", "token_attention")
PARTS = {  # op, or module of sdr_kernels, to what its kernels have in their names; the first that fits is it
    **{op: (op,) for op in ("temporal_stem", "temporal_conv3d", "spatial_mean", "norm_pool")},
    **{op: (op,) for op in ("info_nce", "sdr_loss", "leave_one_out_kl", "clip_views")},
    "head": HEAD,
    "temporal_bottleneck": ("temporal_bottleneck", "bottleneck_chain"),
    "stem_training": ("stem_max", "stem_products", "patch_covariance", "patch_moments"),
    "norm_conv": ("conv_norm", "conv_moments", "covariance"),
    "row_products": ("row_products", "gradient_rows", "sum_tiles"),
    "conv_grad": ("conv_grad", "grad_sums"),
}
MAX_KERNELS = 30
MAX_NAME = 160


def op_of(kernel: str) -> str:
    """The op that a kernel belongs to by its name, "head" for those of the head; "other" where it is none of ours."""
    return next((op for op, parts in PARTS.items() if any(part in kernel for part in parts)), "other")


@contextmanager
def profiled(device: torch.device, *, both: bool = False) -> Iterator[torch_profile]:
    """torch.profiler on every thread.

    Args:
        device: whose activity is recorded.
        both: record the CPU's activity beside a GPU's.
    """
    cpu = device.type == "cpu"
    activities = [ProfilerActivity.CPU] * (cpu or both) + [ProfilerActivity.CUDA] * (not cpu)
    # the threads of a CPU's kernels are Python's, which the profiler does not follow by itself
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True) if cpu else None
    with torch_profile(activities=activities, experimental_config=every_thread) as run:
        yield run
        synchronise(device)


def kernel_table(events: Iterable, device_type: DeviceType, passes: int = PASSES) -> list[dict[str, object]]:
    """Kernels of one pass, longest first: name, op, launches, microseconds.

    Args:
        events: averages of torch.profiler by name.
        device_type: whose events count.
        passes: that were profiled.
    """
    several = device_type == DeviceType.CPU and torch.get_num_threads() > 1
    rows = []
    for event in events:
        total = event.self_device_time_total if device_type == DeviceType.CUDA else event.self_cpu_time_total
        if event.device_type == device_type and total > 0 and not (several and event.key.startswith(OURS)):
            row = {"kernel": event.key[:MAX_NAME], "op": op_of(event.key)}
            rows.append({**row, "launches": event.count / passes, "us": total / passes})
    return sorted(rows, key=lambda row: -row["us"])


def op_table(
    kernels: Sequence[dict], layers: Iterable[Layer], rates: tuple[float, float] | None
) -> dict[str, dict[str, object]]:
    """Op to its launches and microseconds in one pass and, where the ceilings are known, its share of floor.

    Args:
        kernels: of one pass: their op, launches and microseconds, of which none is in another's.
        layers: of the same pass.
        rates: FLOP/s and bytes/s of the machine.
    """
    total = sum(row["us"] for row in kernels)
    layers = list(layers)
    table = {}
    for op in sorted({row["op"] for row in kernels}):
        rows = [row for row in kernels if row["op"] == op]
        us = sum(row["us"] for row in rows)
        table[op] = {"launches": sum(row["launches"] for row in rows), "us": us, "share_of_time": us / total}
        floors = [layer.floor(*rates) for layer in layers if op_of(layer.op) == op] if rates else []
        if floors:
            table[op]["floor_us"] = 1e6 * sum(floors)
            table[op]["share_of_floor"] = table[op]["floor_us"] / us
    return table


def whole_ops(events: Iterable, wall_us: float, passes: int) -> list[dict[str, object]]:
    """Our ops on a CPU with all that they call, and the rest of one pass of ``wall_us`` as "other"."""
    ours = [event for event in events if event.key.startswith(OURS)]
    rows = [
        {"op": op_of(event.key), "launches": event.count / passes, "us": event.cpu_time_total / passes}
        for event in ours
    ]
    rest = wall_us - sum(row["us"] for row in rows)
    return [*rows, {"op": "other", "launches": 0, "us": max(0.0, rest)}]


def profile_kernels(
    call: Callable[[], object],
    device: torch.device,
    *,
    median_s: float,
    layers: Iterable[Layer],
    rates: tuple[float, float] | None,
    passes: int = PASSES,
) -> dict[str, object]:
    """Kernels and ops of a call, and how long a GPU was idle in it.

    Args:
        call: what to profile; it has been called before.
        device: that it runs on.
        median_s: seconds of a call without a profiler.
        layers: what it must compute; none where that is not known.
        rates: FLOP/s and bytes/s of the machine, where they are known.
        passes: calls that are profiled.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    cpu = device.type == "cpu"
    with profiled(device) as run:
        start = time.perf_counter()
        for _ in range(passes):
            call()
        wall_us = 1e6 * (time.perf_counter() - start) / passes
    events = run.key_averages()
    kernels = kernel_table(events, DeviceType.CPU if cpu else DeviceType.CUDA, passes)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    busy_us = sum(row["us"] for row in kernels)
    return {
        "launches": sum(row["launches"] for row in kernels),
        "busy_us": busy_us,
        "idle_share": max(0.0, 1 - busy_us / (1e6 * median_s)),
        "ops": op_table(whole_ops(events, wall_us, passes) if cpu else kernels, layers, rates),
        "kernels": kernels[:MAX_KERNELS],
    }
