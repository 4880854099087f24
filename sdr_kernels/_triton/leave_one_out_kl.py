"""KL divergences of few classes: one program has a block of clips, a row each, and walks over the views."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, randn
from sdr_kernels.leave_one_out_kl import MAX_CLASSES, leave_one_out_kl_reference

BLOCK_B = 32  # clips at a time


@triton.jit
def log_softmax(logits_ptr, row, mask, k, temperature, K: tl.constexpr):
    """Of these rows' K logits over the temperature, [M, BLOCK_K] float32; 0 beyond K. row: of the first class."""
    x = tl.load(logits_ptr + (row[:, None] + k[None, :]), mask=mask[:, None] & (k < K)[None, :], other=0.0)
    x = tl.where((k < K)[None, :], x.to(tl.float32), float("-inf"))
    x = (x - tl.max(x, 1)[:, None]) / temperature  # what is divided last is rounded least
    return tl.where((k < K)[None, :], x - tl.log(tl.sum(tl.exp(x), 1))[:, None], 0.0)


@triton.jit
def divergence(log_p, log_q, mask):
    """KL(P || Q) of each row, [M]; 0 outside the mask, which also keeps the product out of the sum's first addition."""
    return tl.sum(tl.where(mask[:, None], tl.exp(log_p) * (log_p - log_q), 0.0), 1)


@triton.jit
def store_classes(out_ptr, row, mask, k, values, K: tl.constexpr):
    tl.store(out_ptr + (row[:, None] + k[None, :]), values, mask=mask[:, None] & (k < K)[None, :])


@triton.jit
def mutual_information(
    joint_ptr, loo_ptr, djoint_ptr, dloo_ptr, clips, B, V, temperature,
    K: tl.constexpr, BLOCK_K: tl.constexpr, DETACH: tl.constexpr, REVERSE: tl.constexpr, COMPLEMENTARY: tl.constexpr,
):  # fmt: skip
    """What these clips add to L_MI, and their gradients, which are stored."""
    mask = clips < B
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    log_joint = log_softmax(joint_ptr, clips * K, mask, k, temperature, K)
    total = tl.zeros_like(clips).to(tl.float32)
    for v in range(V):
        log_loo = log_softmax(loo_ptr, (clips * V + v) * K, mask, k, temperature, K)
        total += divergence(log_loo, log_joint, mask) if REVERSE else divergence(log_joint, log_loo, mask)
    total = tl.where(total < 0, 0.0, total)  # rounding can leave it there; keeps NaN
    value = tl.exp(-total) if COMPLEMENTARY else total
    slope = (-value if COMPLEMENTARY else tl.full(value.shape, 1.0, tl.float32)) / (B * temperature)
    djoint = tl.zeros_like(log_joint)
    for v in range(V):
        row = (clips * V + v) * K
        log_loo = log_softmax(loo_ptr, row, mask, k, temperature, K)
        apart = tl.exp(log_loo) - tl.exp(log_joint)
        if REVERSE:
            kl = divergence(log_loo, log_joint, mask)
            dloo = tl.exp(log_loo) * (log_loo - log_joint - kl[:, None])
            djoint -= apart
        else:
            kl = divergence(log_joint, log_loo, mask)
            dloo = apart
            djoint += tl.exp(log_joint) * (log_joint - log_loo - kl[:, None])
        store_classes(dloo_ptr, row, mask, k, dloo * slope[:, None], K)
    djoint = tl.zeros_like(djoint) if DETACH else djoint * slope[:, None]
    store_classes(djoint_ptr, clips * K, mask, k, djoint, K)
    return tl.sum(tl.where(mask & (V > 0), value, 0.0), 0) / B


@triton.jit(do_not_specialize=["B", "V"])
def _leave_one_out_kl_fwd_kernel(
    joint_ptr,  # [B, K]
    loo_ptr,  # [B, V, K]
    value_ptr,  # []
    djoint_ptr,  # [B, K]
    dloo_ptr,  # [B, V, K]
    B, V, temperature,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    DETACH: tl.constexpr, REVERSE: tl.constexpr, COMPLEMENTARY: tl.constexpr,
):  # fmt: skip
    value = 0.0
    for start in range(0, B, BLOCK_B):
        clips = start + tl.arange(0, BLOCK_B).to(tl.int64)
        value += mutual_information(
            joint_ptr, loo_ptr, djoint_ptr, dloo_ptr, clips, B, V, temperature,
            K, BLOCK_K, DETACH, REVERSE, COMPLEMENTARY,
        )  # fmt: skip
    tl.store(value_ptr, value)


def leave_one_out_kl_fwd(
    joint_logits: Tensor, loo_logits: Tensor, temperature: float, detach_joint: bool, reverse: bool, complementary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, V, K = loo_logits.shape
    value, djoint, dloo = (
        joint_logits.new_empty(shape, dtype=torch.float32) for shape in ((), joint_logits.shape, loo_logits.shape)
    )
    with torch.cuda.device_of(joint_logits):
        _leave_one_out_kl_fwd_kernel[(1,)](
            joint_logits.contiguous(), loo_logits.contiguous(), value, djoint, dloo, B, V, temperature,
            K=K, BLOCK_B=BLOCK_B, BLOCK_K=triton.next_power_of_2(K),
            DETACH=detach_joint, REVERSE=reverse, COMPLEMENTARY=complementary, num_warps=1,
        )  # fmt: skip
    return value, djoint, dloo


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """The heads of `paper`, and as many classes as there may be, in each reading of the loss."""

    def inputs(K, options, B, device):
        joint, loo = (randn(B, *s, K, device=device, dtype=PRECISIONS[precision]) for s in ((), (BRANCHES,)))
        return joint, loo, 1.5, *options

    def reference(joint, loo, temperature, detach_joint, reverse, complementary):
        direction = "loo_to_joint" if reverse else "joint_to_loo"
        objective = "complementary" if complementary else "shared"
        return leave_one_out_kl_reference(joint, loo, temperature, detach_joint, direction, objective)

    for K in (2, MAX_CLASSES):
        for options in ((True, False, False), (False, True, True)):
            names = zip(("detach", "reverse", "complementary"), options, strict=True)
            name = ", ".join([f"{K} classes", *(name for name, on in names if on)])
            yield AuditCase(name, leave_one_out_kl_fwd, reference, partial(inputs, K, options), matrix=False)
