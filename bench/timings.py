"""Step "timings": the fast model and each of its ops, beside the least time that the measured ceilings allow."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from inputs import layer_inputs, random_model, random_views
from ledger import Ledger, measured
from machine import ROOT, SMALL, Machine

import sdr_kernels
from sdr import SDRConfig
from sdr.fast import SDRModel as FastSDRModel
from sdr.layers import Layer, distinct, layers_of
from sdr.timing import rotation

CLIPS = 16
FRAMES = (8, 16, 32, 64, 128)
BRANCHES = (1, 2, 4, 8, 16)
LIMIT_S = 2.0  # of one measurement


def against_floor(result: dict, layers: list[Layer], machine: Machine) -> dict[str, object]:
    """The result with FLOPs, bytes and, where the ceilings are known, the floor and its share of the time."""
    result = {**result, "flops": sum(x.flops for x in layers), "bytes": sum(x.bytes for x in layers)}
    if machine.rates is not None:
        # layer by layer: each is bound by arithmetic or by memory on its own
        result["floor_s"] = sum(layer.floor(*machine.rates) for layer in layers)
        result["share_of_floor"] = result["floor_s"] / result["median_s"]
    return result


def fast_model(config: SDRConfig, machine: Machine) -> FastSDRModel:
    """The fast model of random weights, after earlier models' memory has been given back."""
    machine.release()
    return FastSDRModel.from_reference(random_model(config, machine.device).to(machine.half)).eval()


def time_model(
    model: FastSDRModel, machine: Machine, clips: int, dtype: torch.dtype, *, packed: bool = True, wall: bool = False
) -> dict[str, object]:
    """Seconds of a forward pass with a clip per branch, and clips per second.

    Args:
        model: of any configuration.
        machine: where.
        clips: B.
        dtype: of the views: the model's, or uint8.
        packed: channels innermost in memory; else [3, T, H, W], as tensors of clips often are.
        wall: time by the wall clock, as a caller who waits for the result.
    """
    views = random_views(model.config, clips, machine.device, dtype)
    if not packed:
        views = views.contiguous()
    result = machine.measure(lambda: model(views), limit_s=LIMIT_S, wall=wall)
    layers = layers_of(model.config, clips, input_itemsize=views.element_size())
    result = against_floor(result, layers, machine)
    return {"clips": clips, "clips_per_s": clips / result["median_s"], "dtype": machine.half_name, **result}


def time_presets(ledger: Ledger, machine: Machine) -> None:
    """Throughput of both presets from bf16 and uint8, and latency of one clip."""
    clips = machine.scaled(CLIPS, 2)
    for preset, config in machine.configs().items():
        model = fast_model(config, machine)
        for name, dtype, packed in [
            ("bf16", machine.half, True),
            ("uint8", torch.uint8, True),
            ("bf16 NCTHW", machine.half, False),
        ]:
            timed = partial(time_model, model, machine, clips, dtype, packed=packed)
            ledger.attempt(f"inference {preset} {name}", timed)
        for name, dtype in [("bf16", machine.half), ("uint8", torch.uint8)]:
            for clock, wall in [("wall", True), ("GPU", False)]:
                timed = partial(time_model, model, machine, 1, dtype, wall=wall)
                ledger.attempt(f"latency {preset} {name} {clock}", timed)


def time_sizes(ledger: Ledger, machine: Machine) -> None:
    """The latency of one branch, then the time for every T and V."""
    config = machine.configs()["ftcn_released"]
    clips = machine.scaled(CLIPS, 1)

    def timed(clips: int, wall: bool = False, **sizes: int) -> dict[str, object]:
        model = fast_model(replace(config, **sizes), machine)
        return time_model(model, machine, clips, machine.half, wall=wall)

    ledger.attempt("latency ftcn_released bf16 wall, 1 branch", partial(timed, 1, wall=True, num_branches=1))
    for T in FRAMES[1:3] if machine.rehearsal else FRAMES:
        ledger.attempt(f"frames {T}", partial(timed, clips, num_frames=T), needs_s=3 * LIMIT_S)
    for V in BRANCHES[:3:2] if machine.rehearsal else BRANCHES:
        ledger.attempt(f"branches {V}", partial(timed, clips, num_branches=V), needs_s=3 * LIMIT_S)


def op_calls(layer: Layer, config: SDRConfig, clips: int, machine: Machine) -> list[Callable[[], object]]:
    """Calls of a layer's op, on as many sets of inputs as it takes for none to stay in the cache."""
    function = getattr(sdr_kernels, layer.op)
    calls = []
    for _ in range(1 if machine.rehearsal else rotation(layer.bytes, machine.device)):
        positional, named = layer_inputs(layer, config, clips, machine.device, machine.half)
        calls.append(partial(function, *positional, **named))
    return calls


def time_op(layer: Layer, count: int, config: SDRConfig, clips: int, machine: Machine) -> dict[str, object]:
    """Seconds of one layer's op; ``count`` layers of the network are of its sizes."""
    machine.release()
    calls = op_calls(layer, config, clips, machine)
    result = against_floor(machine.measure(calls, limit_s=LIMIT_S), [layer], machine)
    if machine.rates is not None:
        result["bound"] = layer.bound(*machine.rates)
    return {"op": layer.op, "count": count, "clips": clips, "inputs": len(calls), "dtype": machine.half_name, **result}


def time_ops(ledger: Ledger, machine: Machine) -> None:
    """Every distinct op of ``ftcn_released`` and the layers that ``paper`` adds, at their real sizes in bf16."""
    for clips in (machine.scaled(CLIPS, 2), 1):
        seen = set()
        for preset, config in machine.configs().items():
            for layer, count in distinct(layers_of(config, clips)):
                if layer not in seen:
                    seen.add(layer)
                    key = f"op {layer.name}, {clips} clips, {preset}"
                    ledger.attempt(key, partial(time_op, layer, count, config, clips, machine), needs_s=LIMIT_S)


FIRST_RESULT = """
import time
import torch
from dataclasses import replace
from sdr import ftcn_released
from sdr.fast import SDRModel
config = replace(ftcn_released(), **{options})
model = SDRModel(config).to("{device}", {dtype}).eval()
shape = 1, config.num_branches, 3, config.num_frames, config.image_size, config.image_size
views = torch.zeros(shape, device="{device}", dtype=torch.uint8)
with torch.inference_mode():
    model(views).logits.tolist()
print(time.time())
"""


def first_result(cache: Path, device: torch.device, options: dict[str, object]) -> float:
    """Seconds from starting Python to ``ftcn_released``'s first logit from uint8, Triton's cache in this folder.

    Args:
        cache: is made where it is not there.
        device: a GPU computes in bfloat16, a CPU in float32.
        options: fields of the configuration that differ.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    code = FIRST_RESULT.format(options=options, device=device, dtype=dtype)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-300:])
    return float(done.stdout) - start


def time_first_results(ledger: Ledger, machine: Machine) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty cache", "warm cache"):
            ledger.attempt(
                f"import to first result, {name}",
                lambda: {"seconds": first_result(Path(folder), machine.device, SMALL if machine.rehearsal else {})},
                needs_s=10,
            )


def deviations(entries: dict[str, object], sizes: str) -> dict[str, float]:
    """Time over work of each size (``frames`` or ``branches``) relative to the middle one's, less 1."""
    rates = {
        key.split()[-1]: entry["median_s"] / entry["flops"]
        for key, entry in entries.items()
        if key.startswith(sizes + " ") and measured(entry)
    }
    base = rates.get({"frames": "32", "branches": "4"}[sizes])
    return {} if base is None else {size: rate / base - 1 for size, rate in rates.items()}


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter every timing, the most wanted first."""
    time_presets(ledger, machine)
    time_first_results(ledger, machine)
    time_ops(ledger, machine)
    time_sizes(ledger, machine)
    for sizes in ("frames", "branches"):
        ledger.put(f"deviation from linear, {sizes}", deviations(ledger.entries, sizes))
