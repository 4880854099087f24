"""Sums of products over rows: gradients of weights, and second moments; see :mod:`sdr_kernels._rows`.

A program has a tile of the products of one branch and tap, over a run of rows. Programs next to each other read the
same rows of x at about the same time, whatever their tap, so that L2 serves all but the first.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, randn
from sdr_kernels._cpu import row_products as plain
from sdr_kernels._rows import accumulator, pooled_size, wide
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels._triton._rows import at, load_gradient, load_values, normed

PROGRAMS = 1024  # enough to fill a large GPU several times over, whatever the GPU: the result must not depend on it
CHAIN = 16384  # rows that a program sums at most: tensor cores cut a float32 sum off every 16, 2e-5 of it in all
FEWEST = 8  # row tiles of a program at least: what it writes should be little beside what it reads
READS = 4  # of gradient rows, by so many tiles and taps, from which on it is less to read if they are written out first


@triton.jit
def share(split, splits, B, row_tiles):
    """The first and past-the-last of B * row_tiles that are this split's: as many as any other's, or one fewer."""
    tiles = tl.cast(B, tl.int64) * row_tiles
    return (split * tiles // splits).to(tl.int32), ((split + 1) * tiles // splits).to(tl.int32)


@triton.jit
def upright(values):
    """[1, M] as [M, 1]; None stays None."""
    column = None  # Triton 3.6 cannot return an argument that is None
    if values is not None:
        column = tl.trans(values)
    return column


@triton.jit
def load_normed(ptr, rows, columns, row_mask, scale, shift, center, C):
    """Normed rows less center, transposed, as a product wants them, [M, K]; 0 where row_mask, [K], is off.

    scale, shift, center: [M, 1] float32, or None.
    """
    mask = row_mask[None, :] & (columns < C)[:, None]
    x = tl.load(ptr + (rows[None, :] * C + columns[:, None]), mask=mask, other=0.0)
    x = normed(x, row_mask[None, :], scale, shift)
    if center is not None:
        x = tl.where(row_mask[None, :], x.to(tl.float32) - center, 0.0).to(x.dtype)
    return x


@triton.jit
def centered(x, center, row_mask):
    """x - center in float64, [M, K], 0 where row_mask, [K], is off; x itself where center, [M, 1] float32, is None."""
    if center is not None:
        x = tl.where(row_mask[None, :], x.to(tl.float64) - center, 0.0)
    return x


@triton.jit(
    do_not_specialize=["B", "V", "T", "H", "W", "num_rows", "pooled_rows", "tap_rows", "kernel", "splits", "code_bytes"]
)
def _row_products_kernel(
    x_ptr,  # [B, V, num_rows, C_in]
    scale_ptr, shift_ptr, center_ptr,  # [V, C_in] float32, or None
    d_ptr, y_ptr,  # [B, V, pooled_rows, C_out]; y or None
    code_ptr,  # [B, V, pooled_rows, ceil(C_out / 4)], or None
    z_ptr,  # [B, V, num_rows, C_out], or None
    coef_ptr,  # [4, V, C_out] float32, or None
    partial_ptr,  # [splits, V, kernel, C_in, C_out] float32, or float64 for float32 rows
    sums_ptr,  # [splits, V, C_out] float64, or None
    B, V, T, H, W, num_rows, pooled_rows, tap_rows, kernel, splits, code_bytes, C_in, C_out,
    POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // kernel  # of C_in by C_out
    tap = (tl.program_id(0) % kernel).to(tl.int64)
    branch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    V = tl.cast(V, tl.int64)
    column_tiles = tl.cdiv(C_out, BLOCK_N)
    c_in = (tile // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = (tile % column_tiles).to(tl.int64) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    scale = upright(load_values(at(scale_ptr, branch * C_in), c_in, C_in))
    shift = upright(load_values(at(shift_ptr, branch * C_in), c_in, C_in))
    x_center = upright(load_values(at(center_ptr, branch * C_in), c_in, C_in))
    factor = load_values(at(coef_ptr, branch * C_out), columns, C_out)
    slope = load_values(at(coef_ptr, (V + branch) * C_out), columns, C_out)
    offset = load_values(at(coef_ptr, (2 * V + branch) * C_out), columns, C_out)
    center = load_values(at(coef_ptr, (3 * V + branch) * C_out), columns, C_out)
    row_tiles = tl.cdiv(tl.cast(num_rows, tl.int64), BLOCK_K).to(tl.int32)
    first, end = share(split, splits, B, row_tiles)
    acc = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    sums = tl.zeros((BLOCK_K, BLOCK_N), acc.dtype)
    for step in range(first, end):
        clip = (step // row_tiles).to(tl.int64) * V + branch
        x_rows = (step % row_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = x_rows - (tap - kernel // 2) * tap_rows
        inside = (x_rows < num_rows) & (rows >= 0) & (rows < num_rows)
        x = load_normed(x_ptr + clip * num_rows * C_in, x_rows, c_in, inside, scale, shift, x_center, C_in)
        pooled = clip * pooled_rows
        g = load_gradient(
            d_ptr + pooled * C_out, at(y_ptr, pooled * C_out), at(code_ptr, pooled * code_bytes),
            at(z_ptr, clip * num_rows * C_out), factor, slope, offset, center, rows, columns,
            inside[:, None] & (columns < C_out)[None, :], C_out, T, H, W, POOL, quads,
        )  # fmt: skip
        if sums_ptr is not None:
            sums += g.to(sums.dtype)
        if x.dtype == tl.float32:
            acc += tl.dot(x, g, input_precision="ieee")
        else:
            acc = tl.dot(x, g.to(x.dtype), acc, input_precision="ieee")
    w_rows = ((split * V + branch) * kernel + tap) * C_in + c_in
    mask = (c_in < C_in)[:, None] & (columns < C_out)[None, :]
    tl.store(partial_ptr + (w_rows[:, None] * C_out + columns[None, :]), acc, mask=mask)
    if sums_ptr is not None:
        sums_mask = (columns < C_out) & (tile < column_tiles) & (tap == kernel // 2)
        tl.store(sums_ptr + ((split * V + branch) * C_out + columns), tl.sum(sums.to(tl.float64), 0), mask=sums_mask)


@triton.jit(do_not_specialize=["B", "V", "T", "H", "W", "num_rows", "pooled_rows", "splits", "code_bytes"])
def _gradient_rows_kernel(
    d_ptr, y_ptr, code_ptr, z_ptr, coef_ptr,  # as above
    out_ptr,  # [B, V, num_rows, C]
    sums_ptr,  # [splits, V, C] float64
    B, V, T, H, W, num_rows, pooled_rows, splits, code_bytes, C,
    POOL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    V = tl.cast(V, tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = tl.program_id(0).to(tl.int64) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    factor = load_values(at(coef_ptr, branch * C), columns, C)
    slope = load_values(at(coef_ptr, (V + branch) * C), columns, C)
    offset = load_values(at(coef_ptr, (2 * V + branch) * C), columns, C)
    center = load_values(at(coef_ptr, (3 * V + branch) * C), columns, C)
    row_tiles = tl.cdiv(tl.cast(num_rows, tl.int64), BLOCK_K).to(tl.int32)
    first, end = share(split, splits, B, row_tiles)
    sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float64 if out_ptr.dtype.element_ty == tl.float32 else tl.float32)
    for step in range(first, end):
        clip = (step // row_tiles).to(tl.int64) * V + branch
        rows = (step % row_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (rows < num_rows)[:, None] & (columns < C)[None, :]
        pooled, clip_row = clip * pooled_rows, clip * num_rows
        g = load_gradient(
            d_ptr + pooled * C, at(y_ptr, pooled * C), at(code_ptr, pooled * code_bytes),
            at(z_ptr, clip_row * C), factor, slope, offset, center, rows, columns, mask, C, T, H, W, POOL, quads,
        )  # fmt: skip
        sums += g.to(sums.dtype)
        tl.store(out_ptr + ((clip_row + rows)[:, None] * C + columns[None, :]), g.to(out_ptr.dtype.element_ty), mask)
    tl.store(sums_ptr + ((split * V + branch) * C + columns), tl.sum(sums.to(tl.float64), 0), mask=columns < C)


@triton.jit(do_not_specialize=["B", "V", "num_rows", "splits"])
def _covariance_kernel(
    x_ptr,  # [B, V, num_rows, C]
    scale_ptr, shift_ptr, center_ptr,  # [V, C] float32, or None
    partial_ptr,  # [splits, V, C, C] float32, or float64 for float32 rows; tiles above the diagonal are not written
    sums_ptr,  # [splits, V, C] float64
    B, V, num_rows, splits, C,
    SINGLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BLOCK_M)
    left_tile, right_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if left_tile < right_tile:
        return
    branch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    left = left_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    right = right_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    left_scale = upright(load_values(at(scale_ptr, branch * C), left, C))
    left_shift = upright(load_values(at(shift_ptr, branch * C), left, C))
    left_center = upright(load_values(at(center_ptr, branch * C), left, C))
    right_scale = upright(load_values(at(scale_ptr, branch * C), right, C))
    right_shift = upright(load_values(at(shift_ptr, branch * C), right, C))
    right_center = upright(load_values(at(center_ptr, branch * C), right, C))
    row_tiles = tl.cdiv(tl.cast(num_rows, tl.int64), BLOCK_K).to(tl.int32)
    first, end = share(split, splits, B, row_tiles)
    acc = tl.zeros((BLOCK_M, BLOCK_M), partial_ptr.dtype.element_ty)
    sums = tl.zeros((BLOCK_M, BLOCK_K), partial_ptr.dtype.element_ty)
    for step in range(first, end):
        clip = (step // row_tiles).to(tl.int64) * V + branch
        rows = (step % row_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = rows < num_rows
        clip_ptr = x_ptr + clip * num_rows * C
        x = load_normed(clip_ptr, rows, left, inside, left_scale, left_shift, None, C)
        x = centered(x, left_center, inside)
        y = x
        if not SINGLE:
            y = load_normed(clip_ptr, rows, right, inside, right_scale, right_shift, None, C)
            y = centered(y, right_center, inside)
        sums += y.to(sums.dtype)
        # not summed by tensor cores, which cut off: squares would lose a little every time; and a product that is added
        # Triton hands to them, one that is subtracted not
        acc -= tl.dot(x, tl.trans(y), input_precision="ieee")
    out_rows = (split * V + branch) * C + left
    mask = (left < C)[:, None] & (right < C)[None, :]
    tl.store(partial_ptr + (out_rows[:, None] * C + right[None, :]), -acc, mask=mask)
    sums_mask = (right < C) & (left_tile == right_tile)
    tl.store(sums_ptr + ((split * V + branch) * C + right), tl.sum(sums.to(tl.float64), 1), mask=sums_mask)


def num_splits(programs: int, B: int, rows: int, block_rows: int) -> int:
    """Into how many runs the rows of B clips, ``rows`` each, are cut; ``programs``: of one run."""
    tiles = B * triton.cdiv(rows, block_rows)
    to_fill = min(triton.cdiv(PROGRAMS, programs), tiles // FEWEST)
    return max(1, to_fill, triton.cdiv(tiles * block_rows, CHAIN))


def products_class(dtype: torch.dtype, C_in: int, C_out: int, raw: bool) -> str:
    """``raw``: gradient rows are read as they are."""
    if dtype == torch.float32:
        return "row_products float32"
    if C_in <= 64 or not raw:
        return f"row_products half in{64 if C_in <= 64 else 128}"
    return f"row_products half raw out{64 if C_out <= 64 else 128}"


def covariance_class(dtype: torch.dtype, C: int) -> str:
    return "covariance float32" if dtype == torch.float32 else f"covariance half out{64 if C <= 64 else 128}"


def written_out(C_in: int, kernel_size: int) -> bool:
    """Gradient rows are read so often that they are written out first."""
    return kernel_size * triton.cdiv(C_in, 128) >= READS


def gradient_rows(
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradient rows of T, H, W in d's dtype; and sums, [V, C] float64, of what they were before they were rounded."""
    B, V, *pooled, C = d.shape
    rows = math.prod(size)
    tile = choose_tile(f"gradient_rows {precision_class(d.dtype)}", B * V * rows, d.device)
    tiles = triton.cdiv(C, tile["BLOCK_N"])
    splits = num_splits(tiles * V, B, rows, tile["BLOCK_K"])
    out = d.new_empty((B, V, *size, C))
    sums = wide(d, splits, V, C)
    with torch.cuda.device_of(d):
        _gradient_rows_kernel[(tiles, V, splits)](
            d, y, code, z, coef, out, sums, B, V, *size, rows, math.prod(pooled), splits, triton.cdiv(C, 4), C,
            POOL=pool, **tile,
        )  # fmt: skip
    return out, sums.sum(0)


def row_products(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    B, V, *size, C_in = x.shape
    C_out, rows = d.shape[-1], math.prod(size)
    if B == 0:
        return wide(x, V, kernel_size, C_in, C_out).zero_(), wide(x, V, C_out).zero_()
    raw = pool == 1 and y is None and coef is None
    sums = None
    if not raw and written_out(C_in, kernel_size):
        d, sums = gradient_rows(d, y, code, pool, z, coef, size)
        raw, y, code, pool, z, coef = True, None, None, 1, None, None
    tile = choose_tile(products_class(x.dtype, C_in, C_out, raw), B * V * rows, x.device)
    tiles = triton.cdiv(C_in, tile["BLOCK_M"]) * triton.cdiv(C_out, tile["BLOCK_N"]) * kernel_size
    splits = num_splits(tiles * V, B, rows, tile["BLOCK_K"])
    partials = x.new_empty((splits, V, kernel_size, C_in, C_out), dtype=accumulator(x.dtype))
    partial_sums = wide(x, splits, V, C_out) if sums is None else None
    with torch.cuda.device_of(x):
        _row_products_kernel[(tiles, V, splits)](
            x, scale, shift, center, d, y, code, z, coef, partials, partial_sums, B, V, *size, rows,
            math.prod(d.shape[2:5]), size[1] * size[2], kernel_size, splits, triton.cdiv(C_out, 4), C_in, C_out,
            POOL=pool, **tile,
        )  # fmt: skip
    if sums is None:
        sums = partial_sums.sum(0)
    return partials.sum(0, dtype=torch.float64), sums


def covariance(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    B, V, T, H, W, C = x.shape
    tile = choose_tile(covariance_class(x.dtype, C), B * V * T * H * W, x.device)
    tiles = triton.cdiv(C, tile["BLOCK_M"])
    splits = num_splits(tiles * (tiles + 1) // 2 * V, B, T * H * W, tile["BLOCK_K"])
    partials = x.new_empty((splits, V, C, C), dtype=accumulator(x.dtype))
    sums = wide(x, splits, V, C)
    # float32 rows, whose products float32 would round: float64 ones, about a pivot, so that no mean is too large
    center = plain.normed(x[:1, :, :1], scale, shift).mean((0, 2, 3, 4)) if x.dtype == torch.float32 else None
    with torch.cuda.device_of(x):
        _covariance_kernel[(tiles * tiles, V, splits)](
            x, scale, shift, center, partials, sums, B, V, T * H * W, splits, C, SINGLE=tiles == 1, **tile
        )  # fmt: skip
    rows = B * T * H * W
    mean = sums.sum(0) / rows
    lower = (partials.sum(0, dtype=torch.float64) / rows - mean[..., :, None] * mean[..., None, :]).tril_()
    return lower + lower.tril(-1).transpose(-1, -2), mean if center is None else mean + center


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """What scheme "fused" and then scheme "gram" ask for, with the largest layers of each shape class."""
    dtype = PRECISIONS[precision]

    def affine(C, device):
        return [randn(BRANCHES, C, device=device) for _ in range(2)]

    def rows(C, size, B, device):
        return randn(B, BRANCHES, *size, C, device=device, dtype=dtype)

    def product_inputs(C_in, C_out, kernel, size, pool, options, B, device):
        pooled = pooled_size(size, pool)
        scale, shift = affine(C_in, device) if "normed" in options else (None, None)
        code = None
        if pool > 1:
            code = torch.zeros((B, BRANCHES, *pooled, triton.cdiv(C_out, 4)), dtype=torch.uint8, device=device)
        y = rows(C_out, pooled, B, device) if "y" in options else None
        z = rows(C_out, size, B, device) if "z" in options else None
        coef = randn(4, BRANCHES, C_out, device=device) if "coef" in options else None
        center = randn(BRANCHES, C_in, device=device) if "center" in options else None
        source = (rows(C_out, pooled, B, device), y, code, pool, z, coef)
        return rows(C_in, size, B, device), scale, shift, center, *source, kernel

    def covariance_inputs(C, size, normed, B, device):
        return rows(C, size, B, device), *(affine(C, device) if normed else (None, None))

    for C_in, C_out, kernel, size, pool, options in (
        (64, 256, 1, (32, 56, 56), 2, "normed y z coef"),
        (256, 1024, 1, (16, 14, 14), 1, "normed y z coef"),
        (256, 512, 1, (16, 56, 56), 4, "y z coef"),
        (128, 128, 1, (16, 56, 56), 4, "normed coef"),  # frozen
        (64, 256, 1, (32, 56, 56), 2, "center y"),
        (256, 1024, 1, (16, 14, 14), 1, "center y"),
        (128, 128, 1, (16, 56, 56), 4, "normed center"),
        (256, 64, 3, (32, 56, 56), 1, ""),
        (2048, 512, 3, (16, 7, 7), 1, ""),
        (512, 2048, 1, (16, 7, 7), 1, "normed y z coef"),
        (1024, 2048, 1, (16, 14, 14), 4, "center y"),
    ):
        name = f"{C_in} to {C_out}, k {kernel}, pool {pool}, {options or 'raw'}"
        inputs = partial(product_inputs, C_in, C_out, kernel, size, pool, options)
        # the kernel that writes gradient rows multiplies no matrices
        matrix = not (options and written_out(C_in, kernel))
        yield AuditCase(name, row_products, plain.row_products, inputs, matrix)
    for C, size, norm in ((64, (32, 56, 56), True), (512, (16, 14, 14), True), (1024, (16, 14, 14), False)):
        name = f"{C}{', normed' * norm}"
        yield AuditCase(name, covariance, plain.covariance, partial(covariance_inputs, C, size, norm))
