"""Batch norm, residual, pool and ReLU of training, elementwise over flat rows; see :mod:`sdr_kernels._rows`."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, randn
from sdr_kernels._cpu import norm_pool as plain
from sdr_kernels._rows import empty_code, empty_pooled
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels._triton._rows import before_pool, load_values
from sdr_kernels._triton.norm_conv import larger, pooled_rows, store_rows


@triton.jit(do_not_specialize=["V", "T", "H", "W"])
def _norm_pool_kernel(
    x_ptr,  # [B, V, T, H, W, C]
    scale_ptr, shift_ptr,  # [V, C] float32
    residual_ptr,  # [B, V, T, H, W, C], or None
    residual_scale_ptr, residual_shift_ptr,  # [V, C] float32, or None
    out_ptr,  # [B, V, pooled rows, C]
    code_ptr,  # [B, V, pooled rows, ceil(C / 4)] uint8, or None
    V, T, H, W, C,
    RELU: tl.constexpr, POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C = tl.cast(C, tl.int64)
    column_tiles = tl.cdiv(C, BLOCK_N)
    column_tile = tl.program_id(0) % column_tiles
    num_rows, out_rows = pooled_rows(T, H, W, 1), pooled_rows(T, H, W, POOL)
    row_tiles = tl.cdiv(out_rows, BLOCK_M)
    row_tile = tl.program_id(0) // column_tiles  # of B * V * row_tiles
    clip = row_tile // row_tiles
    branch = clip % V
    rows = row_tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < out_rows)[:, None] & (columns < C)[None, :]
    scale = load_values(scale_ptr + branch * C, columns, C)
    shift = load_values(shift_ptr + branch * C, columns, C)
    if residual_scale_ptr is not None:
        residual_scale = load_values(residual_scale_ptr + branch * C, columns, C)
        residual_shift = load_values(residual_shift_ptr + branch * C, columns, C)
    best, code = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for corner in tl.static_range(POOL):
        offsets = (clip * num_rows + before_pool(rows, corner, H, W, POOL))[:, None] * C + columns[None, :]
        value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale + shift
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if residual_scale_ptr is not None:
                residual = residual * residual_scale + residual_shift
            value += residual
        best, code = larger(best, value, code, corner)
    out_ptr += clip * out_rows * C
    if code_ptr is not None:
        code_ptr += clip * out_rows * ((C + 3) // 4)
    store_rows(out_ptr, code_ptr, best, code, rows, out_rows, column_tile, C, RELU, BLOCK_M, BLOCK_N)


def norm_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
    pool: int,
    coded: bool,
) -> tuple[Tensor, Tensor]:
    B, V, T, H, W, C = x.shape
    out = empty_pooled(x, C, pool)
    code = empty_code(out, wanted=coded)
    if out.numel() == 0:
        return out, code
    rows = out[0, 0, ..., 0].numel()
    tile = choose_tile(f"norm_pool {precision_class(x.dtype)}", B * V * rows, x.device)
    with torch.cuda.device_of(x):
        _norm_pool_kernel[(triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(C, tile["BLOCK_N"]) * B * V,)](
            x, scale, shift, residual, residual_scale, residual_shift, out, code if coded else None,
            V, T, H, W, C, RELU=relu, POOL=pool, **tile,
        )  # fmt: skip
    return out, code


# channels, T, H, residual, ReLU, pool, code: the layers of "paper" whose rows are the most, for each way of the caller
CASES = (
    (256, 32, 56, "raw", True, 1, False),
    (256, 32, 56, "scaled", True, 1, False),
    (256, 32, 56, "raw", True, 2, True),
    (256, 16, 56, "", True, 4, False),
    (256, 16, 56, "", True, 4, True),
    (2048, 16, 14, "", False, 4, True),
)


def audit_cases(precision: str) -> Iterator[AuditCase]:
    def inputs(C, T, H, residual, relu, pool, coded, B, device):
        def rows():
            return randn(B, BRANCHES, T, H, H, C, device=device, dtype=PRECISIONS[precision])

        values = [randn(BRANCHES, C, device=device) for _ in range(4)]
        scaled = values[2:] if residual == "scaled" else (None, None)
        return rows(), *values[:2], rows() if residual else None, *scaled, relu, pool, coded

    for case in CASES:
        C, _, _, residual, relu, pool, coded = case
        name = f"{C} channels{f', {residual} residual' * bool(residual)}{', relu' * relu}, pool {pool}"
        yield AuditCase(
            name + ", code" * coded,
            lambda *arguments: norm_pool(*arguments)[0],
            lambda *arguments: plain.norm_pool(*arguments)[0],
            partial(inputs, *case),
            matrix=False,
        )
