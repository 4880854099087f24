"""Convolutions of training as products over flat rows, with batch norms before and after; see :mod:`sdr_kernels._rows`.

Moments are centred twice: a tile's deviations are from its own first row and then from their mean, both exact where a
channel is constant, and tiles are summed in float64 about the first row of all. So no mean, however large, costs the
variance a digit.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, randn
from sdr_kernels._cpu import norm_conv as plain
from sdr_kernels._rows import accumulator, empty_code, empty_pooled, wide
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels._triton._rows import before_pool, code_bytes, load_values, normed, pack_code, pooled_rows
from sdr_kernels._triton.temporal_conv3d import relu

PROGRAMS = 256  # that share the sums over tiles: enough for a large GPU, whatever the GPU


@triton.jit
def add_normed_product(
    acc, x_ptr, rows, row_mask, num_rows, tap_rows, scale_ptr, shift_ptr, w_ptr, columns, C_in, C_out,
    KERNEL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [M, N] plus the (KERNEL, 1, 1) convolution of these rows, normed, to these columns.

    x_ptr: [num_rows, C_in] of one clip and branch; scale_ptr, shift_ptr: [C_in] of the branch, or None; w_ptr:
    [KERNEL, C_in, C_out] of the branch; tap_rows: rows of one frame; C_in, C_out: int64.
    """
    steps = tl.cdiv(C_in, BLOCK_K).to(tl.int32)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_tile = x_ptr + (rows[:, None] * C_in + k[None, :])
    w_tile = w_ptr + (k[:, None] * C_out + columns[None, :])
    for step in range(KERNEL * steps):
        k0 = tl.cast(step, tl.int64) * BLOCK_K
        w_row, x_offset, x_mask, inside = k0, k0, row_mask[:, None], True
        if KERNEL > 1:
            tap = tl.cast(step // steps, tl.int64)
            k0 -= tap * steps * BLOCK_K
            tap_offset = (tap - KERNEL // 2) * tap_rows
            w_row, x_offset = tap * C_in + k0, tap_offset * C_in + k0
            inside = (rows + tap_offset >= 0)[:, None] & (rows + tap_offset < num_rows)[:, None]
            x_mask = x_mask & inside
        w_mask = True
        if not EVEN_K:
            x_mask = x_mask & (k0 + k < C_in)[None, :]
            w_mask = w_mask & (k0 + k < C_in)[:, None]
        if not EVEN_N:
            w_mask = w_mask & (columns < C_out)[None, :]
        x = tl.load(x_tile + x_offset, mask=x_mask, other=0.0)
        w = tl.load(w_tile + w_row * C_out, mask=w_mask, other=0.0)
        # a channel beyond the last has scale and shift 0
        x = normed(x, inside, load_values(scale_ptr, k0 + k, C_in), load_values(shift_ptr, k0 + k, C_in))
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def larger(a, b, code_a, code_b):
    """The larger of two and its code: a's of equals; NaN is the largest, and of two the second."""
    better = (b > a) | (b != b)
    return tl.where(better, b, a), tl.where(better, code_b, code_a)


@triton.jit
def place_in_pool(row, POOL: tl.constexpr):
    """Of a row of a tile: which of the tile's results it goes to, and as which corner.

    Tensor cores leave rows r and r + 8 to one thread, so that the first maximum is one of registers.
    """
    result, corner = row, tl.zeros_like(row)
    if POOL == 2:
        result, corner = row // 16 * 8 + row % 8, row // 8 % 2
    if POOL == 4:
        result, corner = row // 16 * 4 + row % 4, row // 4 % 2 * 2 + row // 8 % 2
    return result, corner


@triton.jit
def halves(x, APART: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[M, N] to the rows that have another APART after them and to those others, [M / 2, N] each."""
    a, b = tl.split(tl.permute(tl.reshape(x, (M // (2 * APART), 2, APART, N)), (0, 2, 3, 1)))
    return tl.reshape(a, (M // 2, N)), tl.reshape(b, (M // 2, N))


@triton.jit
def pool_tile(x, POOL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[M, N] in the order of ``place_in_pool`` to [M / POOL, N] and codes, which are 0 without a pool."""
    best, code = x, tl.zeros((M, N), tl.int32)
    if POOL > 1:
        a, b = halves(x, 8, M, N)
        best, code = larger(a, b, 0, 1)
    if POOL == 4:
        a, b = halves(best, 4, M // 2, N)
        code_a, code_b = halves(code, 4, M // 2, N)
        best, code = larger(a, b, code_a, code_b + 2)
    return best, code


@triton.jit
def store_rows(
    out_ptr, code_ptr, out, code, rows, num_rows, column_tile, C,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store rows, [M, N] float32 and int32, from column ``column_tile * BLOCK_N`` on, and their codes unless None.

    out_ptr, code_ptr: of the clip's and branch's first row.
    """
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < num_rows)[:, None] & (columns < C)[None, :]
    if RELU:
        out = relu(out)
    tl.store(out_ptr + (rows[:, None] * C + columns[None, :]), out.to(out_ptr.dtype.element_ty), mask=mask)
    if code_ptr is not None:
        code = tl.where((columns < C)[None, :], code, 0)
        bytes_of_code = code_bytes(C)
        columns = column_tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < bytes_of_code)[None, :]
        packed = pack_code(code, BLOCK_M, BLOCK_N)
        tl.store(code_ptr + (rows[:, None] * bytes_of_code + columns[None, :]), packed, mask=mask)


@triton.jit(do_not_specialize=["V", "num_rows", "tap_rows"])
def _conv_moments_kernel(
    x_ptr,  # [B, V, num_rows, C_in]
    scale_ptr, shift_ptr,  # [V, C_in] float32, or None
    w_ptr,  # [V, KERNEL, C_in, C_out]
    out_ptr,  # [B, V, num_rows, C_out]
    # mean less the tile's first row, and the sum of squared deviations; float64 for float32 rows
    partial_ptr,  # [B, V, row tiles, 2, C_out] float32
    V, num_rows, tap_rows, C_in, C_out,
    KERNEL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C_in, C_out = tl.cast(C_in, tl.int64), tl.cast(C_out, tl.int64)
    column_tiles = tl.cdiv(C_out, BLOCK_N)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    row_tile = tl.program_id(0) // column_tiles  # of B * V * row_tiles
    clip = row_tile // row_tiles
    branch = clip % V
    first_row = row_tile % row_tiles * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    if scale_ptr is not None:
        scale_ptr += branch * C_in
        shift_ptr += branch * C_in
    acc = add_normed_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptr + clip * num_rows * C_in, rows, row_mask, num_rows, tap_rows,
        scale_ptr, shift_ptr, w_ptr + branch * (KERNEL * C_in) * C_out, columns, C_in, C_out,
        KERNEL, EVEN_K, EVEN_N, BLOCK_K,
    )  # fmt: skip
    z = acc.to(out_ptr.dtype.element_ty)
    offsets = (clip * num_rows + rows)[:, None] * C_out + columns[None, :]
    tl.store(out_ptr + offsets, z, mask=row_mask[:, None] & (columns < C_out)[None, :])
    z = z.to(partial_ptr.dtype.element_ty)
    z -= tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, z, 0.0), 0)[None, :]
    z = tl.where(row_mask[:, None], z, 0.0)
    mean = tl.sum(z, 0) / tl.minimum(num_rows - first_row, BLOCK_M).to(z.dtype)
    z = tl.where(row_mask[:, None], z - mean[None, :], 0.0)
    partial_ptr += row_tile * 2 * C_out + columns
    tl.store(partial_ptr, mean, mask=columns < C_out)
    tl.store(partial_ptr + C_out, tl.sum(z * z, 0), mask=columns < C_out)


@triton.jit(do_not_specialize=["B", "V", "num_rows", "splits"])
def _sum_tiles_kernel(
    out_ptr,  # [B, V, num_rows, C]
    partial_ptr,  # [B, V, row tiles, 2, C] float32, or float64 for float32 rows
    sums_ptr,  # [splits, V, 2, C] float64: of deviations from the branch's first row, and of their squares
    B, V, num_rows, C, splits,
    TILE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C = tl.cast(C, tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    branch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row_tiles = tl.cdiv(num_rows, TILE_ROWS)
    origin = tl.load(out_ptr + branch * num_rows * C + columns, mask=columns < C, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    # a fixed share of the tiles: the sum's order never changes
    for step in range(split, tl.cdiv(tl.cast(B, tl.int64) * row_tiles, BLOCK_M), splits):
        tile = step * BLOCK_M + tl.arange(0, BLOCK_M)
        clip, row = tile // row_tiles * V + branch, tile % row_tiles * TILE_ROWS
        tile_mask = tile < tl.cast(B, tl.int64) * row_tiles
        mask = tile_mask[:, None] & (columns < C)[None, :]
        first = tl.load(out_ptr + ((clip * num_rows + row)[:, None] * C + columns[None, :]), mask=mask, other=0.0)
        tile_ptr = partial_ptr + ((clip * row_tiles + tile % row_tiles)[:, None] * 2 * C + columns[None, :])
        mean = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float64)
        deviations = tl.load(tile_ptr + C, mask=mask, other=0.0).to(tl.float64)
        count = tl.where(tile_mask, tl.minimum(num_rows - row, TILE_ROWS), 0).to(tl.float64)[:, None]
        mean += first.to(tl.float64) - origin[None, :]
        sums += count * mean
        squares += deviations + count * mean * mean
    sums_ptr += (split * V + branch) * 2 * C + columns
    tl.store(sums_ptr, tl.sum(sums, 0), mask=columns < C)
    tl.store(sums_ptr + C, tl.sum(squares, 0), mask=columns < C)


@triton.jit(do_not_specialize=["V", "T", "H", "W"])
def _conv_norm_kernel(
    x_ptr,  # [B, V, T, H, W, C_in]
    scale_ptr, shift_ptr,  # [V, C_in] float32, or None
    w_ptr,  # [V, C_in, C_out]
    out_scale_ptr, out_shift_ptr,  # [V, C_out] float32
    residual_ptr,  # [B, V, T, H, W, C_out], or None
    out_ptr,  # [B, V, pooled rows, C_out]
    code_ptr,  # [B, V, pooled rows, ceil(C_out / 4)] uint8, or None
    V, T, H, W, C_in, C_out,
    RELU: tl.constexpr, POOL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C_in, C_out = tl.cast(C_in, tl.int64), tl.cast(C_out, tl.int64)
    column_tiles = tl.cdiv(C_out, BLOCK_N)
    column_tile = tl.program_id(0) % column_tiles
    num_rows, out_rows = pooled_rows(T, H, W, 1), pooled_rows(T, H, W, POOL)
    row_tiles = tl.cdiv(out_rows, BLOCK_M // POOL)
    row_tile = tl.program_id(0) // column_tiles  # of B * V * row_tiles
    clip = row_tile // row_tiles
    branch = clip % V
    first_row = row_tile % row_tiles * (BLOCK_M // POOL)
    result, corner = place_in_pool(tl.arange(0, BLOCK_M), POOL)
    rows = before_pool(first_row + result, corner, H, W, POOL)
    row_mask = first_row + result < out_rows
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += clip * num_rows * C_in
    w_ptr += branch * C_in * C_out
    if scale_ptr is not None:
        scale_ptr += branch * C_in
        shift_ptr += branch * C_in
    if residual_ptr is not None:
        residual_ptr += clip * num_rows * C_out
    out_ptr += clip * out_rows * C_out
    if code_ptr is not None:
        code_ptr += clip * out_rows * ((C_out + 3) // 4)
    acc = add_normed_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptr, rows, row_mask, num_rows, 0,
        scale_ptr, shift_ptr, w_ptr, columns, C_in, C_out, 1, EVEN_K, EVEN_N, BLOCK_K,
    )  # fmt: skip
    acc *= load_values(out_scale_ptr + branch * C_out, columns, C_out)
    acc += load_values(out_shift_ptr + branch * C_out, columns, C_out)
    if residual_ptr is not None:
        mask = row_mask[:, None] & (columns < C_out)[None, :]
        acc += tl.load(residual_ptr + (rows[:, None] * C_out + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    best, code = pool_tile(acc, POOL, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M // POOL)
    store_rows(out_ptr, code_ptr, best, code, rows, out_rows, column_tile, C_out, RELU, BLOCK_M // POOL, BLOCK_N)


def tile_class(op: str, dtype: torch.dtype, C_out: int) -> str:
    return f"{op} {precision_class(dtype)} out{min(width_class(C_out), 128)}"


def even(tile: dict[str, int], C_in: int, C_out: int) -> dict[str, bool]:
    """Whether tiles cover the channels exactly."""
    return {"EVEN_K": C_in % tile["BLOCK_K"] == 0, "EVEN_N": C_out % tile["BLOCK_N"] == 0}


def conv_moments(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    out, partials, tile_rows = convolve_tiles(x, scale, shift, weight)
    return out, sum_tiles(out, partials, tile_rows)


def convolve_tiles(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """The convolution, the moments of each tile of rows, [B, V, tiles, 2, C_out], and how many rows a tile has."""
    B, V, T, H, W, C_in = x.shape
    kernel, C_out = weight.shape[1], weight.shape[3]
    out = empty_pooled(x, C_out, 1)
    tile = choose_tile(tile_class("conv_moments", x.dtype, C_out), B * V * T * H * W, x.device)
    row_tiles = triton.cdiv(T * H * W, tile["BLOCK_M"])
    partials = x.new_empty((B, V, row_tiles, 2, C_out), dtype=accumulator(x.dtype))
    if B == 0:
        return out, partials, tile["BLOCK_M"]
    with torch.cuda.device_of(x):
        _conv_moments_kernel[(row_tiles * triton.cdiv(C_out, tile["BLOCK_N"]) * B * V,)](
            x, scale, shift, weight, out, partials, V, T * H * W, H * W, C_in, C_out,
            KERNEL=kernel, **even(tile, C_in, C_out), **tile,
        )  # fmt: skip
    return out, partials, tile["BLOCK_M"]


def sum_tiles(out: Tensor, partials: Tensor, tile_rows: int) -> Tensor:
    """Mean and biased variance over all rows of a branch, [V, 2, C]."""
    B, V, row_tiles, _, C = partials.shape
    if B == 0:
        return wide(out, V, 2, C).fill_(float("nan"))
    num_rows = out[0, 0, ..., 0].numel()
    tile = choose_tile("conv_moments sums", B * V * row_tiles, out.device)
    grid = triton.cdiv(C, tile["BLOCK_N"]), V
    splits = max(1, min(PROGRAMS // (grid[0] * V), triton.cdiv(B * row_tiles, tile["BLOCK_M"])))
    sums = wide(out, splits, V, 2, C)
    with torch.cuda.device_of(out):
        _sum_tiles_kernel[(*grid, splits)](out, partials, sums, B, V, num_rows, C, splits, TILE_ROWS=tile_rows, **tile)
    mean, square = (sums.sum(0) / (B * num_rows)).unbind(1)
    origin = out[0, :, 0, 0, 0].double()
    # a deviation of the sample itself is at most sqrt(rows) standard deviations: float64 has the digits to subtract
    return torch.stack([origin + mean, square - mean.square()], 1)


def conv_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    out_scale: Tensor,
    out_shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    pool: int,
    coded: bool,
) -> tuple[Tensor, Tensor]:
    B, V, T, H, W, C_in = x.shape
    C_out = weight.shape[3]
    out = empty_pooled(x, C_out, pool)
    code = empty_code(out, wanted=coded)
    if out.numel() == 0:
        return out, code
    rows = out[0, 0, ..., 0].numel()
    tile = choose_tile(tile_class("conv_norm", x.dtype, C_out), B * V * rows * pool, x.device)
    with torch.cuda.device_of(x):
        _conv_norm_kernel[(triton.cdiv(rows, tile["BLOCK_M"] // pool) * triton.cdiv(C_out, tile["BLOCK_N"]) * B * V,)](
            x, scale, shift, weight, out_scale, out_shift, residual, out, code if coded else None,
            V, T, H, W, C_in, C_out, RELU=relu, POOL=pool, **even(tile, C_in, C_out), **tile,
        )  # fmt: skip
    return out, code


# C_in, C_out, k, T, H, normed: the largest layer of each tile class and way to read its input
MOMENTS_CASES = (
    (32, 16, 3, 16, 16, False),
    (8, 32, 1, 32, 16, True),
    (256, 64, 3, 32, 56, False),
    (64, 64, 1, 32, 56, True),
    (2048, 512, 3, 16, 7, False),
    (2048, 512, 1, 16, 7, False),
    (512, 2048, 1, 16, 7, True),
)
# C_in, C_out, T, H, what is around the product, pool, code; the caller's other ways leave out a part of one of these
NORM_CASES = (
    (16, 16, 16, 16, "normed relu", 4, True),
    (8, 32, 32, 16, "residual relu", 2, True),
    (64, 64, 32, 56, "normed relu", 1, False),
    (512, 2048, 16, 7, "residual relu", 1, False),
    (64, 256, 32, 56, "residual relu", 2, True),
    (512, 512, 16, 14, "normed relu", 4, True),
    (1024, 2048, 16, 14, "", 4, True),
)


def audit_cases(precision: str) -> Iterator[AuditCase]:
    dtype = PRECISIONS[precision]

    def first(launcher: Callable) -> Callable:
        return lambda *arguments: launcher(*arguments)[0]

    def values(C, device):
        return [randn(BRANCHES, C, device=device) for _ in range(2)]

    def operands(C_in, C_out, kernel, T, H, normed, B, device):
        x = randn(B, BRANCHES, T, H, H, C_in, device=device, dtype=dtype)
        weight = randn(BRANCHES, kernel, C_in, C_out, device=device, dtype=dtype, fan_in=C_in * kernel)
        return x, *(values(C_in, device) if normed else (None, None)), weight

    def sums_inputs(C, T, H, B, device):
        out = randn(B, BRANCHES, T, H, H, C, device=device, dtype=dtype)
        tile_rows = choose_tile(tile_class("conv_moments", dtype, C), out[..., 0].numel(), device)["BLOCK_M"]
        shape = B, BRANCHES, triton.cdiv(T * H * H, tile_rows), 2, C
        return out, randn(*shape, device=device, dtype=accumulator(dtype)), tile_rows

    def norm_inputs(C_in, C_out, T, H, around, pool, coded, B, device):
        residual = None
        if "residual" in around:
            residual = randn(B, BRANCHES, T, H, H, C_out, device=device, dtype=dtype)
        x = operands(C_in, C_out, 1, T, H, "normed" in around, B, device)
        return *x, *values(C_out, device), residual, "relu" in around, pool, coded

    for case in MOMENTS_CASES:
        name = f"{case[0]} to {case[1]}, k {case[2]}{', normed' * case[-1]}"
        launcher, reference = first(convolve_tiles), first(plain.conv_moments)
        yield AuditCase(name, launcher, reference, partial(operands, *case))
    yield AuditCase("sums of 256", sum_tiles, sums_reference, partial(sums_inputs, 256, 32, 56), matrix=False)
    for case in NORM_CASES:
        C_in, C_out, _, _, around, pool, coded = case
        name = f"{C_in} to {C_out}, {around + ', ' * bool(around)}pool {pool}{', code' * coded}"
        yield AuditCase(name, first(conv_norm), first(plain.conv_norm), partial(norm_inputs, *case))


def sums_reference(out: Tensor, partials: Tensor, tile_rows: int) -> Tensor:
    """Chan's formula over all tiles at once."""
    rows = out.flatten(2, 4)
    counts = [min(tile_rows, rows.shape[2] - start) for start in range(0, rows.shape[2], tile_rows)]
    counts = torch.tensor(counts, dtype=torch.float64, device=out.device)[:, None]
    means = rows[:, :, ::tile_rows].double() + partials[..., 0, :]
    total = counts.sum() * len(out)
    mean = (counts * means).sum((0, 2)) / total
    squares = partials[..., 1, :] + counts * (means - mean[:, None]).square()
    return torch.stack([mean, squares.sum((0, 2)) / total], 1)
