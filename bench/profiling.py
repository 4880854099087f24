"""Step "profile": which kernels inference spends its time in, and how far each op is from its floor."""

from collections.abc import Iterable
from functools import partial

import torch
from inputs import random_views
from ledger import Ledger
from machine import Machine
from timings import CLIPS, LIMIT_S, fast_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sdr.layers import layers_of
from sdr.timing import synchronise

PASSES = 3
OPS = ("temporal_stem", "temporal_bottleneck", "temporal_conv3d", "spatial_mean", "norm_linear", "token_attention")
HEAD = ("norm_linear", "token_attention")
MAX_KERNELS = 30


def op_of(kernel: str) -> str:
    """The op that a kernel belongs to by its name; "other" where it is none of ours."""
    op = next((op for op in OPS if op in kernel), "other")
    return "head" if op in HEAD else op


def kernel_table(events: Iterable, device_type: DeviceType) -> list[dict[str, object]]:
    """Kernels of one forward pass, longest first: name, op, launches, microseconds."""
    rows = []
    for event in events:
        total = event.self_device_time_total if device_type == DeviceType.CUDA else event.self_cpu_time_total
        if event.device_type == device_type and total > 0:
            row = {"kernel": event.key[:160], "op": op_of(event.key)}
            rows.append({**row, "launches": event.count / PASSES, "us": total / PASSES})
    return sorted(rows, key=lambda row: -row["us"])


def op_table(kernels: list[dict], layers: list, rates: tuple[float, float] | None) -> dict[str, dict[str, object]]:
    """Op to its launches and microseconds in one forward pass and, where the ceilings are known, its share of floor."""
    total = sum(row["us"] for row in kernels)
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


def profile_model(clips: int, machine: Machine) -> dict[str, object]:
    """Kernels and ops of a forward pass of ``ftcn_released`` in bf16, and how long the GPU was idle in it."""
    config = machine.configs()["ftcn_released"]
    model = fast_model(config, machine)
    views = random_views(config, clips, machine.device, machine.half)
    cpu = machine.device.type == "cpu"
    call = partial(model, views)
    median_s = machine.measure(call, limit_s=LIMIT_S)["median_s"]
    activity = ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA
    with torch.inference_mode(), profile(activities=[activity]) as run:
        for _ in range(PASSES):
            call()
        synchronise(machine.device)
    kernels = kernel_table(run.key_averages(), DeviceType.CPU if cpu else DeviceType.CUDA)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    busy_us = sum(row["us"] for row in kernels)
    return {
        "clips": clips,
        "median_us": 1e6 * median_s,
        "launches": sum(row["launches"] for row in kernels),
        "idle_share": max(0.0, 1 - busy_us / (1e6 * median_s)),
        "ops": op_table(kernels, layers_of(config, clips), machine.rates),
        "kernels": kernels[:MAX_KERNELS],
    }


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter the profile of many clips and of one."""
    for clips in (machine.scaled(CLIPS, 2), 1):
        ledger.attempt(f"inference, {clips} clips", partial(profile_model, clips, machine))
