"""The ops that training is made of: products over rows, with batch norm, ReLU and pools where rows are read or written.

Activations are [B, V, T, H, W, C] in the order of memory: a row is one (frame, position), and V branches each have
their own weights. Values of channels are float32, [V, C] (float64 for float64 rows); sums over rows come as float64.
Each op has Triton kernels in ``_triton/`` and plain torch in ``_cpu/``, which also takes float64.

Three notions recur:

* *normed rows*: ``relu(x * scale + shift)`` rounded to x's dtype, or x itself where there is no scale.
* *pool*: 1 is none, 2 the maximum over two frames, 4 over 2 x 2 positions; odd ends are dropped. ``code`` says which
  one it was, the first of equals, in two bits a value, four channels to a byte, the first in the lowest bits: for a
  pool over time the frame, over space ``2 * row + column``.
* *gradient rows* from ``(d, y, code, pool, z, coef)``: d, of the pooled shape, counts as 0 where ``y <= 0``, goes to
  the row that ``code`` names, 0 to the others, and with ``coef`` = [4, V, C] becomes
  ``coef[0] * d + coef[1] * (z - coef[3]) + coef[2]``, the derivative through a batch norm of z (without z the middle
  term is absent).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._ops import register

GRADIENT = "Tensor d, Tensor? y, Tensor? code, int pool, Tensor? z, Tensor? coef"


def pooled_size(size: Sequence[int], pool: int) -> tuple[int, int, int]:
    """T, H, W after a pool."""
    T, H, W = size
    return T // 2 if pool == 2 else T, H // 2 if pool == 4 else H, W // 2 if pool == 4 else W


def empty_pooled(x: Tensor, channels: int, pool: int) -> Tensor:
    """Unwritten rows of x's clips after a pool."""
    B, V, *size, _ = x.shape
    return x.new_empty((B, V, *pooled_size(size, pool), channels))


def empty_code(out: Tensor, *, wanted: bool) -> Tensor:
    """Unwritten codes for the pooled rows ``out``; of no channels where none are wanted."""
    return out.new_empty((*out.shape[:-1], -(-out.shape[-1] // 4) if wanted else 0), dtype=torch.uint8)


def wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Of sums over the rows of a tile: what is made of them would show a float32 sum of float32 rows, no other."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def _fake_conv_moments(x, scale, shift, weight):
    out = empty_pooled(x, weight.shape[-1], 1)
    return out, wide(x, weight.shape[0], 2, weight.shape[-1])


def _fake_conv_norm(x, scale, shift, weight, out_scale, out_shift, residual, relu, pool, coded):
    out = empty_pooled(x, weight.shape[-1], pool)
    return out, empty_code(out, wanted=coded)


def _fake_norm_pool(x, scale, shift, residual, residual_scale, residual_shift, relu, pool, coded):
    out = empty_pooled(x, x.shape[-1], pool)
    return out, empty_code(out, wanted=coded)


def _fake_row_products(x, scale, shift, center, d, y, code, pool, z, coef, kernel_size):
    V, C_in, C_out = x.shape[1], x.shape[-1], d.shape[-1]
    return wide(x, V, kernel_size, C_in, C_out), wide(x, V, C_out)


def _fake_conv_grad(
    d, y, code, pool, z, coef, size, weight, h, h_scale, h_shift, matrix, center, const,
    residual, residual_y, residual_code, residual_pool, relu, z_center,
):  # fmt: skip
    V, C = weight.shape[0], weight.shape[-1]
    return d.new_empty((d.shape[0], V, *size, C)), wide(d, V, 2, C if z_center is not None else 0)


def empty_stem(x, weight, scale, shift):
    B, V, _, T, H, W = x.shape
    out = weight.new_empty((B, V, T, (H // 2 + 1) // 2, (W // 2 + 1) // 2, weight.shape[1]))
    return out, torch.empty_like(out, dtype=torch.uint8)


# x [.., C_in], normed, weight [V, k, C_in, C_out] to the convolution z, rounded, and the mean and biased variance of
# the rounded z over all its rows, [V, 2, C_out]
conv_moments = register(
    "norm_conv",
    "conv_moments",
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, str impl) -> (Tensor, Tensor)",
    fake=_fake_conv_moments,
)
# pool(conv(normed x) * out_scale + out_shift + residual), the sum in float32; clipped below 0 where ``relu``; and the
# pool's code where ``coded``. weight is [V, 1, C_in, C_out]; residual has the rows before the pool
conv_norm = register(
    "norm_conv",
    "conv_norm",
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor out_scale, Tensor out_shift, Tensor? residual, "
    "bool relu, int pool, bool coded, str impl) -> (Tensor, Tensor)",
    fake=_fake_conv_norm,
)
# pool(x * scale + shift + residual * residual_scale + residual_shift), clipped below 0 where ``relu``, and the code;
# a residual without scale is added as it is
norm_pool = register(
    "norm_pool",
    "norm_pool",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, "
    "bool relu, int pool, bool coded, str impl) -> (Tensor, Tensor)",
    fake=_fake_norm_pool,
)
# sums over rows r of x[r + tap - k // 2] (normed, less center, 0 outside of time) times the gradient row g[r], both
# rounded to x's dtype: [V, k, C_in, C_out]; and sums of g, [V, C_out]
row_products = register(
    "row_products",
    "row_products",
    f"(Tensor x, Tensor? scale, Tensor? shift, Tensor? center, {GRADIENT}, int kernel_size, str impl) "
    "-> (Tensor, Tensor)",
    fake=_fake_row_products,
)
# biased covariance over rows of normed x, [V, C, C], and its mean, [V, C]
covariance = register(
    "row_products",
    "covariance",
    "(Tensor x, Tensor? scale, Tensor? shift, str impl) -> (Tensor, Tensor)",
    fake=lambda x, scale, shift: (wide(x, x.shape[1], x.shape[-1], x.shape[-1]), wide(x, x.shape[1], x.shape[-1])),
)
# For every row r of ``size`` = (T, H, W): sum over taps of g[r + tap - k // 2] (rounded to d's dtype, 0 outside of
# time) times weight [V, k, C_out, C_in], plus (h - center) (rounded) times matrix [V, C_in, C_in], plus const, plus the
# gradient row of (residual, residual_y, residual_code, residual_pool), which is raw or pooled; then, where ``relu``,
# 0 where h <= 0. h is normed by h_scale and h_shift. With ``z_center`` (h raw is then z) also the sums over rows of the
# result, before it is rounded, and of the result times (z - z_center), [V, 2, C_in]
conv_grad = register(
    "conv_grad",
    "conv_grad",
    f"({GRADIENT}, int[] size, Tensor weight, Tensor? h, Tensor? h_scale, Tensor? h_shift, Tensor? matrix, "
    "Tensor? center, Tensor? const, Tensor? residual, Tensor? residual_y, Tensor? residual_code, int residual_pool, "
    "bool relu, Tensor? z_center, str impl) -> (Tensor, Tensor)",
    fake=_fake_conv_grad,
)
# sums over rows of the gradient row g of (d, y, code, pool) and of g * (z - center), [V, 2, C]
grad_sums = register(
    "conv_grad",
    "grad_sums",
    "(Tensor d, Tensor? y, Tensor? code, int pool, Tensor z, Tensor center, str impl) -> Tensor",
    fake=lambda d, y, code, pool, z, center: wide(d, d.shape[1], 2, d.shape[-1]),
)
# The stem's rows are pixels of x, [B, V, 3, T, H, W] of any strides; a pixel's patch is its three colours at k frames,
# 0 outside of time, in the order of weight, [V, C, 3, k].
# Biased covariance over pixels of patches, [V, 3k, 3k], and their mean, [V, 3k]
patch_covariance = register(
    "stem_training",
    "patch_covariance",
    "(Tensor x, int kernel_size, str impl) -> (Tensor, Tensor)",
    fake=lambda x, k: (wide(x, x.shape[1], 3 * k, 3 * k), wide(x, x.shape[1], 3 * k)),
)
# conv, * scale + shift, 2x2 pool, ReLU, 3x3 pool of stride 2 and border 1: [B, V, T, H', W', C], and which pixel it
# was, uint8 of the same shape: 4 * (3 * i + j) + 2 * di + dj for the pixel (4 * row - 2 + 2 * i + di, and so on), the
# first of equals in this order
stem_max = register(
    "stem_training",
    "stem_max",
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, str impl) -> (Tensor, Tensor)",
    fake=empty_stem,
)
# sums over the stem's results of d, where y > 0, times the patch of the pixel that code names, [V, C, 3k]; and of d
# where y > 0, [V, C]
stem_products = register(
    "stem_training",
    "stem_products",
    "(Tensor x, Tensor d, Tensor y, Tensor code, int kernel_size, str impl) -> (Tensor, Tensor)",
    fake=lambda x, d, y, code, k: (wide(d, d.shape[1], d.shape[-1], 3 * k), wide(d, d.shape[1], d.shape[-1])),
)
