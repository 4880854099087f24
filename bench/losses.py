"""Step "losses": values and gradients of SDR's losses, beside what else computes them in the same run."""

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from ledger import NOT_MEASURED, Ledger
from machine import Machine
from torch import Tensor

from sdr_kernels import LossOptions, info_nce, leave_one_out_kl, sdr_loss
from sdr_kernels.info_nce import info_nce_reference
from sdr_kernels.leave_one_out_kl import leave_one_out_kl_reference
from sdr_kernels.sdr_loss import sdr_loss_reference

BATCH = 16, 4  # clips and views of the paper's batch
WIDTHS = (1024, 2048)
BANK = 65_536, 128  # rows and width of a bank of embeddings
EAGER_ROWS = 16_384  # whose N x N matrices, several at once, take some gigabytes
LIMIT_S = 1.0  # of one measurement
COMPILE_S = 8.0  # not begun with less time left

NO_LIGER_INFO_NCE = "Liger has no contrastive loss of labelled rows"  # of version 0.8.5

Loss = Callable[..., Tensor]


def batch(D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Arguments of ``sdr_loss``; the floating ones ask for gradients."""
    B, V = BATCH
    x, z, joint, loo = (torch.randn(s, device=device, dtype=dtype) for s in ((B, V, D), (B,), (B, 2), (B, V, 2)))
    floating = [t.requires_grad_() for t in (x, z, joint, loo)]
    return [floating[0], torch.arange(B, device=device) % 2, *floating[1:]]


def rows(N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Arguments of ``info_nce``."""
    return [torch.randn(N, D, device=device, dtype=dtype).requires_grad_(), torch.arange(N, device=device) % 2]


def step(loss: Loss, inputs: list[Tensor]) -> None:
    """Forward and backward, as a training step calls it."""
    with torch.inference_mode(False), torch.enable_grad():
        torch.autograd.grad(loss(*inputs).sum(), [t for t in inputs if t.requires_grad], allow_unused=True)


def launches(call: Callable[[], object]) -> int:
    """Kernels that a call launches on the GPU; those that fill or copy count too."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def time_call(call: Callable[[], object], machine: Machine) -> dict[str, object]:
    """Seconds, launches and the most memory beyond the inputs'."""
    machine.release()
    result = machine.measure(call, limit_s=LIMIT_S)
    if machine.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return result | {"launches": launches(call), "peak_bytes": torch.cuda.max_memory_allocated() - before}
    return result | {"launches": 0, "peak_bytes": 0}  # the rehearsal has neither


def metric_learning() -> Loss:
    """The supervised contrastive loss of pytorch-metric-learning."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=0.07)


def liger_kl() -> Loss:
    """The leave-one-out KL by Liger's kernel: its own of log-probabilities, which plain torch makes of the logits."""
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence, temperature = LigerKLDIVLoss(reduction="sum", log_target=True), LossOptions().mi_temperature

    def loss(joint: Tensor, loo: Tensor) -> Tensor:
        log_loo = F.log_softmax(loo.float() / temperature, -1)  # [B, V, K]
        log_joint = F.log_softmax(joint.detach().float() / temperature, -1).unsqueeze(1).expand_as(log_loo)
        return divergence(log_loo.flatten(0, 1), log_joint.flatten(0, 1).contiguous()) / len(joint)

    return loss


def time_kl(ledger: Ledger, machine: Machine) -> None:
    """The mutual-information loss of the paper's batch."""
    joint, loo = batch(machine.scaled(WIDTHS[0], 64), machine.half, machine.device)[3:]
    losses: dict[str, Callable[[], Loss]] = {
        "ours": lambda: partial(leave_one_out_kl, impl="triton"),
        "eager": lambda: leave_one_out_kl_reference,
        "Liger": liger_kl,
    }
    for name, build in losses.items():
        ledger.attempt(f"leave-one-out KL, {name}", partial(time_loss, build, [joint, loo], machine), needs_s=LIMIT_S)
    ledger.put("InfoNCE, Liger", NOT_MEASURED + NO_LIGER_INFO_NCE)


def time_loss(build: Callable[[], Loss], inputs: list[Tensor], machine: Machine) -> dict[str, object] | str:
    """A step of a loss, or what it lacks."""
    try:
        loss = build()
    except ModuleNotFoundError as error:
        return f"{NOT_MEASURED}{error}"
    return time_call(partial(step, loss, inputs), machine)


def time_batches(ledger: Ledger, machine: Machine) -> None:
    """The paper's batch: our one launch, then a step of ours and of what others run."""
    kernels = ("triton", "cuda") if machine.device.type == "cuda" else ("triton",)
    for D in WIDTHS[:1] if machine.rehearsal else WIDTHS:
        for precision, dtype in (("bf16", machine.half), ("fp32", torch.float32)):
            inputs = batch(machine.scaled(D, 64), dtype, machine.device)
            detached = [t.detach() for t in inputs]
            name = f"16 x 4 x {D} {precision}"
            for impl in kernels:
                call = partial(torch.ops.sdr_kernels.sdr_loss_fwd, *detached, *LossOptions().arguments, impl)
                ledger.attempt(f"{name}, values and gradients, {impl}", partial(time_call, call, machine))
                call = partial(step, partial(sdr_loss, impl=impl), inputs)
                ledger.attempt(f"{name}, step, {impl}", partial(time_call, call, machine))
            call = partial(step, sdr_loss_reference, inputs)
            ledger.attempt(f"{name}, step, eager", partial(time_call, call, machine))
    inputs = batch(machine.scaled(WIDTHS[0], 64), machine.half, machine.device)
    compiled = torch.compile(sdr_loss_reference, backend="eager" if machine.rehearsal else "inductor")
    call = partial(step, compiled, inputs)
    name = f"16 x 4 x {WIDTHS[0]} bf16, step, torch.compile"
    ledger.attempt(name, partial(time_call, call, machine), needs_s=COMPILE_S)


def time_banks(ledger: Ledger, machine: Machine) -> None:
    """InfoNCE of many rows: ours at full size, then ours and the others where theirs fit."""
    N, D = (machine.scaled(size, small) for size, small in zip(BANK, (200, 16), strict=True))
    few = machine.scaled(EAGER_ROWS, 100)
    inputs = rows(N, D, machine.half, machine.device)
    ours = partial(info_nce, impl="triton")
    ledger.attempt(f"InfoNCE {BANK[0]} x {BANK[1]}, ours", lambda: time_call(partial(step, ours, inputs), machine))
    inputs = rows(few, D, machine.half, machine.device)
    peers: dict[str, Callable[[], Loss]] = {
        "ours": lambda: ours,
        "eager": lambda: info_nce_reference,
        "torch.compile": lambda: torch.compile(
            info_nce_reference, backend="eager" if machine.rehearsal else "inductor"
        ),
        "pytorch-metric-learning": metric_learning,
    }
    for name, build in peers.items():
        timed = partial(time_loss, build, inputs, machine)
        needs_s = COMPILE_S if name == "torch.compile" else LIMIT_S
        ledger.attempt(f"InfoNCE {EAGER_ROWS} x {BANK[1]}, {name}", timed, needs_s=needs_s)


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter every timing of the losses."""
    if machine.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # before a launcher imports Triton
    time_batches(ledger, machine)
    time_banks(ledger, machine)
    time_kl(ledger, machine)
