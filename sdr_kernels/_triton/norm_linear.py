"""A linear layer on few rows: each program reads its few columns' weights once, pipelined, and all of its rows.

Layer norm needs a row's statistics before the first product. Every program computes those of its rows anew, in two
passes over rows that the L2 cache holds: cheaper than a launch of its own.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import FRAMES, PRECISIONS, AuditCase, randn
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels._triton.temporal_conv3d import load_columns
from sdr_kernels.norm_linear import norm_linear_reference


@triton.jit
def load_rows(x_tile, start, k, row_mask, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns start + k of these rows, [M, BLOCK_K]; 0 outside. x_tile: addresses of columns k."""
    mask = row_mask[:, None]
    if K % BLOCK_K != 0:
        mask = mask & (start + k < K)[None, :]
    return tl.load(x_tile + start, mask=mask, other=0.0)


@triton.jit
def row_statistics(x_tile, k, row_mask, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / standard deviation of these rows, [M] each: the mean first, then squares about it.

    What is left of the sum about the rounded mean corrects both: a constant row has a variance of 0.
    """
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        total += load_rows(x_tile, start, k, row_mask, K, BLOCK_K).to(tl.float32)
    mean = tl.sum(total, 1) / K
    left = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = load_rows(x_tile, start, k, row_mask, K, BLOCK_K).to(tl.float32)
        centred = tl.where((start + k < K)[None, :], x - mean[:, None], 0.0)
        left += centred
        squares += centred * centred
    shift = tl.sum(left, 1) / K
    squares = tl.where(row_mask[:, None], squares, 0.0)  # no FMA makes the lanes' sums differ
    var = tl.sum(squares, 1) / K - shift * shift
    return mean + shift, 1.0 / tl.sqrt_rn(tl.where(var < 0, 0.0, var) + eps)  # keeps NaN


@triton.jit(do_not_specialize=["num_rows"])
def _norm_linear_fwd_kernel(
    x_ptr,  # [num_rows, K], rows x_stride apart
    w_ptr,  # [N, K]
    bias_ptr,  # [N] float32, or None
    gamma_ptr, beta_ptr,  # [K] float32, or None
    residual_ptr,  # [num_rows, N], rows residual_stride apart, or None
    out_ptr,  # [num_rows, N]
    num_rows, x_stride, residual_stride, eps,
    K: tl.constexpr, N: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    # programs of the same columns are neighbours: the first reads the weights from memory, the others from the cache
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    # only a scalar moves in the loop: addresses of the tile's own take the fewest registers
    x_tile = x_ptr + (rows[:, None] * x_stride + k[None, :])
    w_tile = w_ptr + (columns[None, :] * K + k[:, None])
    if gamma_ptr is not None:
        mean, rstd = row_statistics(x_tile, k, row_mask, eps, K, BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = load_rows(x_tile, start, k, row_mask, K, BLOCK_K)
        if gamma_ptr is not None:
            normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            normed = normed * load_columns(gamma_ptr, start + k, K) + load_columns(beta_ptr, start + k, K)
            # beyond K a large mean may overflow before gamma's 0 meets it
            x = tl.where((start + k < K)[None, :], normed, 0.0).to(x_ptr.dtype.element_ty)
        w_mask = (columns < N)[None, :]
        if K % BLOCK_K != 0:
            w_mask = w_mask & (start + k < K)[:, None]
        w = tl.load(w_tile + start, mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += load_columns(bias_ptr, columns, N)
    if GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    mask = row_mask[:, None] & (columns < N)[None, :]
    if residual_ptr is not None:
        residual_offsets = rows[:, None] * residual_stride + columns[None, :]
        acc += tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (rows[:, None] * N + columns[None, :]), acc.to(out_ptr.dtype.element_ty), mask=mask)


def flat_rows(x: Tensor) -> Tensor:
    """x: [..., K] to [M, K] with neighbours in a row; copied only where no row stride describes it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, gelu: bool,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    N, K = weight.shape
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    x = flat_rows(x)
    residual = None if residual is None else flat_rows(residual)
    tile = choose_tile(f"norm_linear {precision_class(x.dtype)}", len(x), x.device)
    grid = (triton.cdiv(len(x), tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    bias, gamma, beta = (None if t is None else t.contiguous() for t in (bias, gamma, beta))
    with torch.cuda.device_of(x):
        _norm_linear_fwd_kernel[grid](
            x, weight.contiguous(), bias, gamma, beta, residual, out,
            len(x), x.stride(0), 0 if residual is None else residual.stride(0), eps,
            K=K, N=N, GELU=gelu, **tile,
        )  # fmt: skip
    return out


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """TRFI's projections and the linear layers of a transformer, as wide as `paper` and as narrow as `tiny`."""
    dtype = PRECISIONS[precision]
    tokens = FRAMES // 2 + 1

    def inputs(K, N, has_norm, gelu, has_residual, B, device):
        x = randn(B, tokens, K, device=device, dtype=dtype)
        weight = randn(N, K, device=device, dtype=dtype, fan_in=K)
        gamma, beta = (randn(K, device=device) if has_norm else None for _ in range(2))
        residual = randn(B, tokens, N, device=device, dtype=dtype) if has_residual else None
        return x, weight, randn(N, device=device), gamma, beta, 1e-5, gelu, residual

    def reference(x, weight, bias, gamma, beta, eps, gelu, residual):
        norm = None if gamma is None else (gamma, beta, eps)
        return norm_linear_reference(x, weight, bias, norm, "gelu" if gelu else "none", residual)

    layers = {
        "projection": (8192, 1024, False, False, False),
        "norm, GELU": (1024, 2048, True, True, False),
        "residual": (2048, 1024, False, False, True),
        "norm, logit": (1024, 1, True, False, False),
    }
    for name, (K, N, *options) in layers.items():
        yield AuditCase(f"{K} to {N}, {name}", norm_linear_fwd, reference, partial(inputs, K, N, *options))
