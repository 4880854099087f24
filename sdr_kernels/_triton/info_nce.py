"""InfoNCE of many rows: a program has some rows and walks over all columns of the similarity matrix, a tile at a time.

Forward and backward take float32 tiles of one size: an inner product must round alike in both, or the exponentials of a
row no longer add up to their sum. The gradient of a similarity is what its row asks and what its column asks: the
matrix is symmetric, so one walk adds both.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import PRECISIONS, AuditCase, randn
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels.info_nce import ZERO_NORM, info_nce_reference


@triton.jit
def load_features(features_ptr, rows, norm, columns, N, D: tl.constexpr):
    """features[rows, columns]; 0 outside. float32 is divided by the rows' norms at once, as the definition does."""
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    x = tl.load(features_ptr + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0)
    if x.dtype == tl.float32:
        x = x / norm[:, None]
    return x


@triton.jit
def left_over(norm, dtype: tl.constexpr):
    """What ``load_features`` left to multiply by. Products of half floats are exact, so these come after them."""
    return tl.full(norm.shape, 1.0, tl.float32) if dtype == tl.float32 else 1.0 / norm


@triton.jit
def norm_of(square):
    """Infinite for a row that is too short to have a direction (``ZERO_NORM``), so that what it divides is 0."""
    return tl.where(square < 1e-24, float("inf"), tl.sqrt_rn(square))


@triton.jit
def row_norms(features_ptr, rows, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(features_ptr + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    return norm_of(tl.sum(squares, 1))


@triton.jit
def inner_products(
    features_ptr, rows, norm, columns, other_norm, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of these rows with those, [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_features(features_ptr, rows, norm, k, N, D)
        y = load_features(features_ptr, columns, other_norm, k, N, D)
        acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee")
    return acc


@triton.jit
def others(first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile's row is not its column, [BLOCK_M, BLOCK_N]; in 32 bits, which take half the registers."""
    ahead = (first_row - first_column).to(tl.int32)
    return tl.arange(0, BLOCK_M)[:, None] + ahead != tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def at_least_one(count):
    return tl.where(count > 1.0, count, 1.0)


@triton.jit
def rounded(weights, dtype: tl.constexpr):
    """float32 weights as ``product_with_rows`` will see them, so that what is subtracted later can cancel."""
    if dtype == tl.bfloat16:
        weights = weights.to(tl.bfloat16).to(tl.float32)
    elif dtype == tl.float16:  # has no exponents for weights near 1 / N: TF32's mantissa is as long
        weights = (weights.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def product_with_rows(weights, x, acc):
    """acc + weights @ x in float32: exact products of rounded weights and x."""
    if x.dtype == tl.bfloat16:
        acc = tl.dot(weights.to(tl.bfloat16), x, acc)
    elif x.dtype == tl.float16:
        acc = tl.dot(weights, x.to(tl.float32), acc, input_precision="tf32")
    else:
        acc = tl.dot(weights, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["N"])
def _info_nce_fwd_kernel(
    features_ptr,  # [N, D]
    labels_ptr,  # [N], integers
    rows_ptr,  # [4, N] float64, see load_row_terms: reads the first, writes the others
    loss_ptr,  # [N] float32: what each row adds
    N, temperature,
    D: tl.constexpr, REAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = features_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    mask = rows < N
    norm = tl.load(rows_ptr + rows, mask=mask, other=float("inf")).to(tl.float32)
    label = tl.load(labels_ptr + rows, mask=mask, other=0)
    # equal similarities differ by 0: no FMA takes a product of one into the difference (the where is between),
    # both factors' order is the same for both rows, and the division comes last
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)  # less the largest, as the exponents: small numbers round little
    count = tl.zeros((BLOCK_M,), tl.float32)
    anchors = 0.0
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
        other = tl.load(labels_ptr + columns, mask=columns < N, other=0)
        other_norm = tl.load(rows_ptr + columns, mask=columns < N, other=float("inf")).to(tl.float32)
        dots = inner_products(features_ptr, rows, norm, columns, other_norm, N, D, BLOCK_M, BLOCK_N, BLOCK_K)
        near = dots * (left_over(norm, dtype)[:, None] * left_over(other_norm, dtype)[None, :])
        apart = (columns < N)[None, :] & others(first, start, BLOCK_M, BLOCK_N)
        same = apart & (label[:, None] == other[None, :])
        near = tl.where(apart, near, float("-inf"))
        highest = tl.maximum(largest, tl.max(near, 1), propagate_nan=tl.PropagateNan.ALL)
        # a row that has met none but itself: the difference of two -inf would be NaN
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp((largest - base) / temperature) + tl.sum(tl.exp((near - base[:, None]) / temperature), 1)
        positive += tl.where(count > 0, (largest - base) * count, 0.0)
        positive += tl.sum(tl.where(same, near - base[:, None], 0.0), 1)
        count += tl.sum(same.to(tl.float32), 1)
        largest = highest
        anchor_columns = (columns < N) & (other == 0) if REAL else columns < N
        anchors += tl.sum(anchor_columns.to(tl.float32), 0)
    anchor = (count > 0) & (label == 0) if REAL else count > 0
    weight = tl.where(anchor, 1.0 / at_least_one(anchors), 0.0)
    each = weight / at_least_one(count)
    loss = tl.where(anchor, tl.log(total) * weight - positive / temperature * each, 0.0)
    wide = N.to(tl.int64)
    tl.store(rows_ptr + wide + rows, largest, mask=mask)
    tl.store(rows_ptr + 2 * wide + rows, tl.where(anchor, weight / total, 0.0), mask=mask)
    tl.store(rows_ptr + 3 * wide + rows, each, mask=mask)
    tl.store(loss_ptr + rows, loss, mask=mask)


@triton.jit
def load_row_terms(rows_ptr, rows, N):
    """Norm, largest similarity, weight over sum of exponentials, weight of each positive; outside weightless."""
    mask, wide = rows < N, N.to(tl.int64)
    norm = tl.load(rows_ptr + rows, mask=mask, other=float("inf")).to(tl.float32)
    largest = tl.load(rows_ptr + wide + rows, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(rows_ptr + 2 * wide + rows, mask=mask, other=0.0).to(tl.float32)
    return norm, largest, weight, tl.load(rows_ptr + 3 * wide + rows, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _info_nce_bwd_kernel(
    features_ptr,  # [N, D]
    labels_ptr,  # [N], integers
    rows_ptr,  # [4, N] float64, of the forward
    dloss_ptr,  # [] float32
    dfeatures_ptr,  # [N, D]
    N, temperature,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = features_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    norm, largest, weight, each = load_row_terms(rows_ptr, rows, N)
    length = left_over(norm, dtype)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=0)
    along = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
        other_norm, other_largest, other_weight, other_each = load_row_terms(rows_ptr, columns, N)
        other = tl.load(labels_ptr + columns, mask=columns < N, other=0)
        dots = inner_products(features_ptr, rows, norm, columns, other_norm, N, D, BLOCK_M, BLOCK_N, BLOCK_K)
        across = left_over(other_norm, dtype)[None, :]
        apart = (columns < N)[None, :] & others(first, start, BLOCK_M, BLOCK_N)
        near = tl.where(apart, dots * (length[:, None] * across), float("-inf"))
        pull = tl.exp((near - largest[:, None]) / temperature) * weight[:, None]
        pull += tl.exp((near - other_largest[None, :]) / temperature) * other_weight[None, :]
        pull -= tl.where(label[:, None] == other[None, :], each[:, None] + other_each[None, :], 0.0)
        pull = rounded(tl.where(apart, pull * across, 0.0), dtype)
        along += tl.sum(tl.where((columns < N)[None, :], pull * dots, 0.0), 1)  # a row's own: 0, or NaN is kept
        acc = product_with_rows(pull, load_features(features_ptr, columns, other_norm, d, N, D), acc)
    own = load_features(features_ptr, rows, norm, d, N, D).to(tl.float32)
    if D <= BLOCK_D:  # all columns are here: the product itself cancels better than its sum of another order
        along = tl.sum(tl.where((d < D)[None, :], acc * own, 0.0), 1)
    dx = (acc - own * (along * length * length)[:, None]) * (tl.load(dloss_ptr) / (norm * temperature))[:, None]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    tl.store(dfeatures_ptr + (rows[:, None] * D + d[None, :]), dx.to(dfeatures_ptr.dtype.element_ty), mask=mask)


def prepare(name: str, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Contiguous features, labels that a kernel can read, and the tile."""
    tile = choose_tile(f"{name} {precision_class(features.dtype)}", len(features), features.device)
    width = width_class(features.shape[1])
    tile = tile | {axis: min(tile[axis], width) for axis in ("BLOCK_K", "BLOCK_D") if axis in tile}
    labels = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    return features.contiguous(), labels.contiguous(), tile


def info_nce_fwd(features: Tensor, labels: Tensor, temperature: float, real_anchors: bool) -> tuple[Tensor, Tensor]:
    N, D = features.shape
    rows, losses = features.new_empty((4, N), dtype=torch.float64), features.new_empty(N, dtype=torch.float32)
    if N == 0:
        return losses.sum(), rows
    norm = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    rows[0] = norm.masked_fill(norm < ZERO_NORM, torch.inf)
    features, labels, tile = prepare("info_nce_fwd", features, labels)
    grid = (triton.cdiv(N, tile["BLOCK_M"]),)
    with torch.cuda.device_of(features):
        _info_nce_fwd_kernel[grid](features, labels, rows, losses, N, temperature, D=D, REAL=real_anchors, **tile)
    return losses.sum(), rows


def info_nce_bwd(features: Tensor, labels: Tensor, rows: Tensor, dloss: Tensor, temperature: float) -> Tensor:
    N, D = features.shape
    dfeatures = torch.empty_like(features, memory_format=torch.contiguous_format)
    if N == 0:
        return dfeatures
    features, labels, tile = prepare("info_nce_bwd", features, labels)
    grid = triton.cdiv(N, tile["BLOCK_M"]), triton.cdiv(D, tile["BLOCK_D"])
    with torch.cuda.device_of(features):
        _info_nce_bwd_kernel[grid](features, labels, rows, dloss, dfeatures, N, temperature, D=D, **tile)
    return dfeatures


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """A bank of narrow embeddings, and the features of `paper`."""

    def features(N, D, clips, device):
        return randn(clips * N, D, device=device, dtype=PRECISIONS[precision])

    def labels(x):
        return torch.arange(len(x), device=x.device) % 2

    def forward(N, D, clips, device):
        x = features(N, D, clips, device)
        return x, labels(x), 0.07, False

    def backward(N, D, clips, device):
        x = features(N, D, clips, device)
        return x, labels(x), randn(4, len(x), device=device, dtype=torch.float64), randn(device=device), 0.07

    def loss(x, labels, temperature, _real):
        return info_nce_reference(x, labels, temperature)

    for N, D in ((4096, 128), (64, 2048)):
        yield AuditCase(f"rows of {D}", info_nce_fwd, loss, partial(forward, N, D))
        yield AuditCase(f"rows of {D}, gradient", info_nce_bwd, loss, partial(backward, N, D))
