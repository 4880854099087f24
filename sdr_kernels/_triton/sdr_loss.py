"""All of SDR's losses and gradients in one launch, for as many rows of features as fit one program.

Every program computes all similarities anew, cheaper than to wait for others, and then the gradient of its own columns
of the features; one more program has the logits.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, randn
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels._triton.info_nce import (
    at_least_one,
    inner_products,
    left_over,
    load_features,
    norm_of,
    product_with_rows,
    rounded,
    row_norms,
)
from sdr_kernels._triton.leave_one_out_kl import log_softmax, mutual_information, store_classes
from sdr_kernels.sdr_loss import LossOptions, empty_results, sdr_loss_reference


@triton.jit
def contrastive(
    features_ptr, labels_ptr, dfeatures_ptr, columns, N, V, temperature,
    D: tl.constexpr, REAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """InfoNCE of all rows; the gradient of these columns of the features is stored."""
    dtype: tl.constexpr = features_ptr.dtype.element_ty
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    norm = tl.full((BLOCK_N,), 1.0, tl.float32)
    if dtype == tl.float32:
        norm = row_norms(features_ptr, rows, N, D, BLOCK_N, BLOCK_D)
    dots = inner_products(features_ptr, rows, norm, rows, norm, N, D, BLOCK_N, BLOCK_N, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    apart = lane[:, None] != lane[None, :]
    if dtype != tl.float32:
        norm = norm_of(tl.sum(tl.where(apart, 0.0, dots), 1))
    length = left_over(norm, dtype)
    apart = apart & (rows < N)[:, None] & (rows < N)[None, :]
    near = tl.where(apart, dots * (length[:, None] * length[None, :]), float("-inf"))
    label = tl.load(labels_ptr + rows // V, mask=rows < N, other=0).to(tl.int32)
    same = apart & (label[:, None] == label[None, :])
    count = tl.sum(same.to(tl.float32), 1)
    anchor = (rows < N) & (label == 0) if REAL else rows < N
    weight = tl.where(anchor & (count > 0), 1.0, 0.0)
    each = weight / at_least_one(count)
    largest = tl.max(near, 1)
    # 0 of a row that meets no other would be 1 / 0: such a row has no weight
    exponentials = tl.where(apart, tl.exp((near - largest[:, None]) / temperature), 0.0)
    total = tl.sum(exponentials, 1)
    total = tl.where(weight == 0, 1.0, total)
    nearness = tl.sum(tl.where(same, near - largest[:, None], 0.0), 1) / temperature
    anchors = at_least_one(tl.sum(anchor.to(tl.float32), 0))
    loss = tl.sum(tl.where(weight == 0, 0.0, tl.log(total) * weight - nearness * each), 0) / anchors
    pull = exponentials * (weight / total)[:, None] - tl.where(same, each[:, None], 0.0)
    pull = tl.where(apart, pull + tl.trans(pull), 0.0) * length[None, :] / (anchors * temperature)
    pull = rounded(pull, dtype)
    # a row's own product too: 0, or NaN is kept
    along = tl.sum(tl.where((rows < N)[None, :], pull * dots, 0.0), 1) * length * length
    x = load_features(features_ptr, rows, norm, columns, N, D)
    dx = product_with_rows(pull, x, tl.zeros((BLOCK_N, BLOCK_D), tl.float32))
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    if D <= BLOCK_D:  # all columns are here: the product itself cancels better than its sum of another order
        along = tl.sum(tl.where(mask, dx * x.to(tl.float32), 0.0), 1) * length * length
    dx = (dx - x.to(tl.float32) * along[:, None]) / norm[:, None]
    tl.store(dfeatures_ptr + (rows[:, None] * D + columns[None, :]), dx, mask=mask)
    return loss


@triton.jit
def cross_entropy(logits_ptr, row, mask, label, dlogits_ptr, scale, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum over these rows of the cross-entropy times scale; its gradient is stored."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    log_p = log_softmax(logits_ptr, row, mask, k, 1.0, K)
    target = k[None, :] == label[:, None]
    store_classes(dlogits_ptr, row, mask, k, (tl.exp(log_p) - tl.where(target, 1.0, 0.0)) * scale, K)
    return -tl.sum(tl.where(mask[:, None] & target, log_p, 0.0)) * scale


@triton.jit
def binary_cross_entropy(logits_ptr, clips, label, B, dlogits_ptr):
    """Sum over these clips, over B; its gradient is stored."""
    mask = clips < B
    z = tl.load(logits_ptr + clips, mask=mask, other=0.0).to(tl.float32)
    shrunk = tl.exp(-tl.abs(z))
    target = label.to(tl.float32)
    sigmoid = tl.where(z < 0, shrunk, 1.0) / (1.0 + shrunk)
    tl.store(dlogits_ptr + clips, (sigmoid - target) / B, mask=mask)
    negative = tl.where(z > 0, 0.0, -z)  # keeps NaN
    rounded_sum = 1.0 + shrunk
    # log1p: the sum's rounding divided out again (Kahan)
    log = tl.where(rounded_sum == 1.0, shrunk, tl.log(rounded_sum) * (shrunk / (rounded_sum - 1.0)))
    return tl.sum(tl.where(mask, (1.0 - target) * z + negative + log, 0.0), 0) / B


@triton.jit(do_not_specialize=["B", "V", "W"])
def _sdr_loss_fwd_kernel(
    features_ptr,  # [B * V, D]
    labels_ptr,  # [B], integers
    logits_ptr,  # [B]
    joint_ptr,  # [B, K]
    loo_ptr,  # [B, W, K]
    parts_ptr,  # [4] float32: ce, mi, contrastive, aux
    dfeatures_ptr,  # [B * V, D] float32
    dlogits_ptr,  # [B] float32
    djoint_ptr,  # [2, B, K] float32, of mi and of aux
    dloo_ptr,  # [2, B, W, K] float32
    B, V, W, temperature, mi_temperature,
    D: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr,
    DETACH: tl.constexpr, REVERSE: tl.constexpr, COMPLEMENTARY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program > 0:
        columns = (program - 1) * BLOCK_D + tl.arange(0, BLOCK_D)
        loss = contrastive(
            features_ptr, labels_ptr, dfeatures_ptr, columns, B * V, V, temperature, D, REAL, BLOCK_N, BLOCK_D
        )
        if program == 1:
            tl.store(parts_ptr + 2, loss)
    else:
        if D == 0:
            tl.store(parts_ptr + 2, 0.0)
        ce, mi, aux = 0.0, 0.0, 0.0
        for start in range(0, B, BLOCK_B):
            clips = start + tl.arange(0, BLOCK_B).to(tl.int64)
            mask = clips < B
            label = tl.load(labels_ptr + clips, mask=mask, other=0).to(tl.int64)
            ce += binary_cross_entropy(logits_ptr, clips, label, B, dlogits_ptr)
            mi += mutual_information(
                joint_ptr, loo_ptr, djoint_ptr, dloo_ptr, clips, B, W, mi_temperature,
                K, BLOCK_K, DETACH, REVERSE, COMPLEMENTARY,
            )  # fmt: skip
            scale = 1.0 / (B * (1 + W))
            aux += cross_entropy(joint_ptr, clips * K, mask, label, djoint_ptr + B.to(tl.int64) * K, scale, K, BLOCK_K)
            for w in range(W):
                row = (clips * W + w) * K
                dloo_aux = dloo_ptr + B.to(tl.int64) * W * K
                aux += cross_entropy(loo_ptr, row, mask, label, dloo_aux, scale, K, BLOCK_K)
        tl.store(parts_ptr, ce)
        tl.store(parts_ptr + 1, mi)
        tl.store(parts_ptr + 3, aux)


def sdr_loss_fwd(
    features: Tensor, labels: Tensor, logits: Tensor, joint_logits: Tensor, loo_logits: Tensor,
    temperature: float, mi_temperature: float, real_anchors: bool, detach_joint: bool, reverse: bool,
    complementary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, V, D = features.shape
    _, W, K = loo_logits.shape
    out = empty_results(features, joint_logits, loo_logits)
    labels = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    block_n = width_class(B * V) if D else 16
    tile = choose_tile(f"sdr_loss {precision_class(features.dtype)} rows{block_n}", B * V, features.device)
    inputs = (x.contiguous() for x in (features, labels, logits, joint_logits, loo_logits))
    with torch.cuda.device_of(features):
        _sdr_loss_fwd_kernel[(1 + triton.cdiv(D, tile["BLOCK_D"]),)](
            *inputs, *out, B, V, W, temperature, mi_temperature,
            D=D, K=K, REAL=real_anchors, DETACH=detach_joint, REVERSE=reverse, COMPLEMENTARY=complementary,
            BLOCK_N=block_n, BLOCK_K=triton.next_power_of_2(K), BLOCK_B=16, **tile,
        )  # fmt: skip
    return out


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """A batch of `paper` a rank, and of fewer clips and narrower features."""

    def inputs(B, V, D, _clips, device):
        x, logits, joint, loo = (
            randn(B, *shape, device=device, dtype=PRECISIONS[precision]) for shape in ((V, D), (), (2,), (V, 2))
        )
        return x, torch.arange(B, device=device) % 2, logits, joint, loo, *LossOptions().arguments

    def reference(features, labels, logits, joint, loo, *_):
        return sdr_loss_reference(features, labels, logits, joint, loo)

    # no width: the contrastive loss is info_nce's own
    for B, V, D in ((4, 4, 64), (8, BRANCHES, 1024), (16, BRANCHES, 2048), (64, BRANCHES, 0)):
        yield AuditCase(f"{B} x {V} rows of {D}", sdr_loss_fwd, reference, partial(inputs, B, V, D))
