"""Step "training": a step of the fast model in both schemes, what memory it takes, and eager and compiled peers."""

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from correctness import ALLOWED, relative_error
from curves import BAND, SMALL, STEPS, apart, compare
from inputs import random_model, random_views
from ledger import Ledger
from machine import Machine
from peers import ChannelsLast, branch_major
from torch import Tensor, nn

from sdr import SDRConfig, SDRLoss, SDRModel, tiny
from sdr.config import GroupedConfig
from sdr.fast import SDRModel as FastSDRModel

CLIPS = 16  # of 4 branches: the paper's batch
MOST_CLIPS = 256
LIMIT_S = 3.0  # of one measurement
COMPILE_S = 30.0  # not begun with less time left
SCHEMES = ("gram", "fused")

Step = Callable[[], None]


def training_step(model: nn.Module, views: Tensor, dtype: torch.dtype) -> Step:
    """Forward, losses and backward as the trainer runs them in ``dtype``; the optimiser is everyone's and left out."""
    labels = torch.arange(len(views), device=views.device) % 2
    loss = SDRLoss()

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(views.device.type, dtype, enabled=dtype != torch.float32):
                output = model(views)
            loss(output, labels).total.backward()
            model.zero_grad(set_to_none=True)

    return step


def time_step(build: Callable[[], nn.Module], views: Callable[[int], Tensor], clips: int, machine: Machine) -> dict:
    """Seconds, clips per second and peak memory of as many clips as fit, halved until they do."""
    while True:
        machine.release()
        try:
            step = training_step(build(), views(clips), machine.half)
            if machine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result = machine.measure(step, limit_s=LIMIT_S)
        except torch.OutOfMemoryError:
            step = None
            gc.collect()
            if clips == 1:
                raise
            clips //= 2
            continue
        peak = torch.cuda.max_memory_allocated() if machine.device.type == "cuda" else 0
        rate = {"clips": clips, "clips_per_s": clips / result["median_s"], "dtype": machine.half_name}
        return {**rate, "peak_bytes": peak, **result}


def peak_bytes(model: nn.Module, views: Tensor, machine: Machine) -> int:
    """Of one step."""
    machine.release()
    step = training_step(model, views, machine.half)
    step()
    if machine.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def largest_batch(model: nn.Module, views: Callable[[int], Tensor], machine: Machine) -> dict[str, int]:
    """Clips, doubled until they do not fit, and what each adds to the peak between the two largest that do."""
    peaks: dict[int, int] = {}
    clips, most = machine.scaled(CLIPS // 2, 1), machine.scaled(MOST_CLIPS, 2)
    while clips <= most:
        try:
            peaks[clips] = peak_bytes(model, views(clips), machine)
        except torch.OutOfMemoryError:
            break
        clips *= 2
    *_, few, many = peaks
    return {"clips": many, "bytes_per_clip": (peaks[many] - peaks[few]) // (many - few), "peak_bytes": peaks[many]}


def gradients(model: nn.Module, views: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(views.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            output = model(views)
        SDRLoss()(output, torch.arange(len(views), device=views.device) % 2).total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def compared(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, object]:
    """Gradients' errors in units of eager's: the median over parameters, which passes or not, and the largest."""
    ratios = [
        relative_error(found[name], truth) / relative_error(eager[name], truth)
        for name, truth in exact.items()
        if truth.count_nonzero() > 0
    ]
    median = torch.tensor(ratios).median().item()
    return {"median": median, "largest": max(ratios), "passed": median <= ALLOWED}


def check_gradients(scheme: str, machine: Machine) -> dict[str, object]:
    """Errors of a step's gradients against float64, in units of those of eager in the same dtype.

    The median over parameters of the model at full width on small clips, which float64 can hold.
    """
    sizes = {"image_size": machine.scaled(32, 16), "num_frames": machine.scaled(8, 2)}
    config = replace(config_of(machine), **sizes, dropout=0.0)
    model = random_model(config, machine.device).train()
    views = random_views(config, machine.scaled(4, 2), machine.device)
    found, eager = (gradients(m, views, machine.half) for m in (fast_model(model, scheme, "triton"), model))
    exact = gradients(copy.deepcopy(model).double(), views.double(), torch.float64)
    return compared(found, eager, exact)


def curves_apart(machine: Machine) -> dict[str, object]:
    """How far the losses of ``tiny`` by the kernels are from the plain branches' in 200 steps."""
    config = replace(tiny(), **SMALL) if machine.rehearsal else tiny()
    steps = machine.scaled(STEPS, 2)
    return {"steps": steps, "band": BAND, "apart": apart(compare(config, impl_of(machine), machine.device, steps))}


def config_of(machine: Machine) -> SDRConfig:
    """``ftcn_released``; the rehearsal, whose kernels are interpreted, has the smallest of all."""
    small = replace(tiny(), num_branches=1, num_frames=2, image_size=16)
    return small if machine.rehearsal else machine.configs()["ftcn_released"]


def impl_of(machine: Machine) -> str:
    """What is timed: the kernels; in the rehearsal the CPU's own, since a step interpreted takes seconds."""
    return "cpu" if machine.rehearsal else "triton"


def reference(machine: Machine) -> SDRModel:
    return random_model(config_of(machine), machine.device).train()


def fast_model(model: SDRModel, scheme: str, impl: str) -> FastSDRModel:
    """The fast model of the same weights that trains by this scheme."""
    fast = FastSDRModel.from_reference(model)
    fast.grouped = GroupedConfig(scheme=scheme, impl=impl)
    return fast


def fast(scheme: str, machine: Machine) -> FastSDRModel:
    return fast_model(reference(machine), scheme, impl_of(machine))


def compiled(model: SDRModel, backend: str = "inductor") -> SDRModel:
    """torch.compile over every branch's backbone, which share their code, and over what follows them."""
    for part in (*model.branches, model.trfi, model.transformer):
        part.compile(backend=backend, dynamic=False)
    return model


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter gradients' errors, steps of ours and eager, losses, memory of a clip, the compiler's step; and failures."""
    if machine.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # before a launcher imports Triton
    config, clips = config_of(machine), machine.scaled(CLIPS, 2)

    def views(count: int, *, channels_last: bool = True) -> Tensor:
        return branch_major(random_views(config, count, machine.device, machine.half), channels_last=channels_last)

    ledger.put("failed", len(SCHEMES) + 1)  # until all have run
    checks = [ledger.attempt(f"gradients {s}", partial(check_gradients, s, machine)) for s in SCHEMES]
    bad = sum(not (isinstance(check, dict) and check["passed"]) for check in checks)
    planar, backend = partial(views, channels_last=False), "eager" if machine.rehearsal else "inductor"
    steps = {f"step {s}": (partial(fast, s, machine), views) for s in SCHEMES} | {
        "peer eager bf16 NCTHW": (partial(reference, machine), planar),
        "peer eager bf16 channels_last_3d": (lambda: ChannelsLast(reference(machine)), views),
    }
    for name, (build, inputs) in steps.items():
        ledger.attempt(name, partial(time_step, build, inputs, clips, machine), needs_s=LIMIT_S)
    curves = ledger.attempt("losses of tiny", partial(curves_apart, machine))
    bad += not (isinstance(curves, dict) and max(curves["apart"].values()) <= BAND)
    ledger.put("failed", bad)
    for scheme in SCHEMES:
        ledger.attempt(f"memory {scheme}", lambda scheme=scheme: largest_batch(fast(scheme, machine), views, machine))
    timed = partial(time_step, lambda: compiled(reference(machine), backend), planar, clips, machine)
    ledger.attempt("peer torch.compile default bf16", timed, needs_s=COMPILE_S)
