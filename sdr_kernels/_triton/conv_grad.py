"""Gradients of rows: products of gradient rows with weights, and what training adds, masks and sums beside them.

A product reads its rows as ``_rows.py`` says and rounds them on the way to the tensor cores; a second one, of centred
activations with a matrix, adds to the same accumulator.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, FRAMES, PRECISIONS, AuditCase, Block, randn
from sdr_kernels._cpu import conv_grad as plain
from sdr_kernels._rows import accumulator, pooled_size
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels._triton._rows import (
    at,
    before_pool,
    code_bytes,
    load_code,
    load_gradient,
    load_values,
    normed,
    pooled_rows,
)


@triton.jit
def add_gradient_product(
    acc, d_ptr, y_ptr, code_ptr, z_ptr, coef_ptr, w_ptr, rows, num_rows, columns, V, C_out, C_in, T, H, W,
    POOL: tl.constexpr, KERNEL: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [M, N] plus the (KERNEL, 1, 1) convolution of gradient rows, rounded to d's dtype.

    d_ptr to z_ptr: of one clip and branch; coef_ptr: [4, V, C_out] from this branch on; w_ptr: [KERNEL, C_out, C_in];
    rows: [M]; columns: [N].
    """
    wide_out = tl.cast(C_out, tl.int64)
    plane, steps = V * wide_out, tl.cdiv(wide_out, BLOCK_K)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    w_tile = w_ptr + (k[:, None] * C_in + columns[None, :])
    for step in range(KERNEL * steps):
        tap = tl.cast(0, tl.int64)
        if KERNEL > 1:
            tap = tl.cast(tl.cast(step, tl.int32) // steps.to(tl.int32), tl.int64)
        k0 = (step - tap * steps) * BLOCK_K
        ahead = (tap - KERNEL // 2) * H * W
        mask = ((rows + ahead >= 0) & (rows + ahead < num_rows))[:, None]
        w_mask = True
        if not EVEN:
            mask = mask & (k0 + k < C_out)[None, :]
            w_mask = (k0 + k < C_out)[:, None] & (columns < C_in)[None, :]
        # without a pool only the pointers move, by scalars: the tile's own addresses stay in their registers
        jump = k0 if POOL > 1 else ahead * wide_out + k0
        places = rows + ahead if POOL > 1 else rows
        g = load_gradient(
            d_ptr + jump, at(y_ptr, jump), code_ptr, at(z_ptr, jump),
            load_values(coef_ptr, k0 + k, C_out), load_values(at(coef_ptr, plane), k0 + k, C_out),
            load_values(at(coef_ptr, 2 * plane), k0 + k, C_out), load_values(at(coef_ptr, 3 * plane), k0 + k, C_out),
            places, k, mask, C_out, T, H, W, POOL, k0 // 4 + tl.arange(0, BLOCK_K // 4),
        )  # fmt: skip
        w = tl.load(w_tile + (tap * wide_out + k0) * C_in, mask=w_mask, other=0.0)
        acc = tl.dot(g.to(w.dtype), w, acc, input_precision="ieee")
    return acc


@triton.jit
def add_centered_product(
    acc, h_ptr, scale_ptr, shift_ptr, center_ptr, matrix_ptr, rows, num_rows, columns, C,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [M, N] plus (normed h - center), rounded, times the matrix.

    h_ptr: [num_rows, C]; scale_ptr, shift_ptr, center_ptr: [C]; matrix_ptr: [C, C]; rows: [M]; columns: [N].
    """
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    h_tile = h_ptr + (rows[:, None] * C + k[None, :])
    matrix_tile = matrix_ptr + (k[:, None] * C + columns[None, :])
    for step in range(tl.cdiv(tl.cast(C, tl.int64), BLOCK_K)):
        k0 = step * BLOCK_K
        mask = (rows < num_rows)[:, None]
        matrix_mask = True
        if not EVEN:
            mask = mask & (k0 + k < C)[None, :]
            matrix_mask = (k0 + k < C)[:, None] & (columns < C)[None, :]
        h = tl.load(h_tile + k0, mask=mask, other=0.0)
        h = normed(h, mask, load_values(scale_ptr, k0 + k, C), load_values(shift_ptr, k0 + k, C))
        h = (h.to(tl.float32) - load_values(center_ptr, k0 + k, C)).to(h.dtype)
        matrix = tl.load(matrix_tile + k0 * C, mask=matrix_mask, other=0.0)
        acc = tl.dot(h, matrix, acc, input_precision="ieee")
    return acc


@triton.jit
def store_sums(partial_ptr, g, products, columns, C):
    """Sums over rows of g and of products, both [M, N], to partial [2, C], in its dtype."""
    g, products = g.to(partial_ptr.dtype.element_ty), products.to(partial_ptr.dtype.element_ty)
    tl.store(partial_ptr + columns, tl.sum(g, 0), mask=columns < C)
    products = tl.where((columns < C)[None, :], products, 0.0)  # no FMA makes the lanes' sums differ
    tl.store(partial_ptr + (C + columns), tl.sum(products, 0), mask=columns < C)


@triton.jit(do_not_specialize=["B", "V", "num_rows", "T", "H", "W"])
def _conv_grad_kernel(
    d_ptr, y_ptr,  # [B, V, pooled rows, C_out]; y or None
    code_ptr,  # [B, V, pooled rows, ceil(C_out / 4)], or None
    z_ptr,  # [B, V, num_rows, C_out], or None
    coef_ptr,  # [4, V, C_out] float32, or None
    w_ptr,  # [V, KERNEL, C_out, C_in]
    h_ptr,  # [B, V, num_rows, C_in], or None
    h_scale_ptr, h_shift_ptr,  # [V, C_in] float32, or None
    matrix_ptr,  # [V, C_in, C_in], or None
    center_ptr, const_ptr,  # [V, C_in] float32, or None
    residual_ptr, residual_y_ptr,  # [B, V, pooled rows, C_in], or None
    residual_code_ptr,  # [B, V, pooled rows, ceil(C_in / 4)], or None
    z_center_ptr,  # [V, C_in] float32, or None
    out_ptr,  # [B, V, num_rows, C_in]
    partial_ptr,  # [V, B, row tiles, 2, C_in] float32, or float64 for float32 rows, or None
    B, V, C_out, C_in, num_rows, T, H, W,
    POOL: tl.constexpr, RESIDUAL_POOL: tl.constexpr, KERNEL: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(C_in, BLOCK_N)
    row_tiles = tl.cdiv(tl.cast(num_rows, tl.int64), BLOCK_M)
    tiles = (row_tiles * column_tiles).to(tl.int32)
    clip = (tl.program_id(0) // tiles).to(tl.int64)  # of B * V
    branch = clip % V
    tile = tl.program_id(0) % tiles
    row_tile = (tile // column_tiles).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pooled = clip * pooled_rows(T, H, W, POOL)
    channels = branch * C_in
    h_ptr = at(h_ptr, clip * num_rows * C_in)
    h_scale_ptr = at(h_scale_ptr, channels)
    h_shift_ptr = at(h_shift_ptr, channels)
    acc = add_gradient_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        d_ptr + pooled * C_out, at(y_ptr, pooled * C_out), at(code_ptr, pooled * code_bytes(C_out)),
        at(z_ptr, clip * num_rows * C_out), at(coef_ptr, branch * C_out), w_ptr + channels * KERNEL * C_out,
        rows, num_rows, columns, V, C_out, C_in, T, H, W, POOL, KERNEL, EVEN, BLOCK_K,
    )  # fmt: skip
    if matrix_ptr is not None:
        acc = add_centered_product(
            acc, h_ptr, h_scale_ptr, h_shift_ptr, center_ptr + channels, matrix_ptr + channels * C_in,
            rows, num_rows, columns, C_in, EVEN, BLOCK_K,
        )  # fmt: skip
    mask = (rows < num_rows)[:, None] & (columns < C_in)[None, :]
    if const_ptr is not None:
        acc += load_values(const_ptr + channels, columns, C_in)
    if residual_ptr is not None:
        pooled = clip * pooled_rows(T, H, W, RESIDUAL_POOL)
        quads = (tile % column_tiles).to(tl.int64) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        acc += load_gradient(
            residual_ptr + pooled * C_in, at(residual_y_ptr, pooled * C_in),
            at(residual_code_ptr, pooled * code_bytes(C_in)), None, None, None, None, None,
            rows, columns, mask, C_in, T, H, W, RESIDUAL_POOL, quads,
        )  # fmt: skip
    offsets = rows[:, None] * C_in + columns[None, :]
    if RELU or z_center_ptr is not None:
        z = tl.load(h_ptr + offsets, mask=mask, other=0.0)
    if RELU:
        h = normed(z, mask, load_values(h_scale_ptr, columns, C_in), load_values(h_shift_ptr, columns, C_in))
        acc = tl.where(h.to(tl.float32) <= 0, 0.0, acc)  # NaN passes
    if z_center_ptr is not None:
        acc = tl.where(mask, acc, 0.0)
        products = acc * (z.to(tl.float32) - load_values(z_center_ptr + channels, columns, C_in))
        part = (branch * B + clip // V) * row_tiles + row_tile
        store_sums(partial_ptr + part * 2 * C_in, acc, products, columns, C_in)
    tl.store(out_ptr + (clip * num_rows * C_in + offsets), acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "V", "num_rows", "T", "H", "W"])
def _grad_sums_kernel(
    d_ptr, y_ptr,  # [B, V, pooled rows, C]; y or None
    code_ptr,  # [B, V, pooled rows, ceil(C / 4)], or None
    z_ptr,  # [B, V, num_rows, C]
    center_ptr,  # [V, C] float32
    partial_ptr,  # [V, B, parts, 2, C] float32, or float64 for float32 rows
    B, V, C, num_rows, T, H, W,
    POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(C, BLOCK_N)
    pooled = pooled_rows(T, H, W, POOL)
    parts = tl.cdiv(pooled, BLOCK_M * STEPS)
    tiles = (parts * column_tiles).to(tl.int32)
    clip = (tl.program_id(0) // tiles).to(tl.int64)  # of B * V
    branch = clip % V
    tile = tl.program_id(0) % tiles
    part = (tile // column_tiles).to(tl.int64)
    columns = (tile % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = (tile % column_tiles).to(tl.int64) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    center = load_values(center_ptr + branch * C, columns, C)
    d_ptr += clip * pooled * C
    y_ptr = at(y_ptr, clip * pooled * C)
    code_ptr = at(code_ptr, clip * pooled * code_bytes(C))
    z_ptr += clip * num_rows * C
    sums = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    products = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    first = part * (BLOCK_M * STEPS)
    for start in range(first, tl.minimum(first + BLOCK_M * STEPS, pooled), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        read = rows < pooled
        mask = read[:, None] & (columns < C)[None, :]
        # rows of the pool's result: each value counts at one of the rows that met there
        d = load_gradient(d_ptr, y_ptr, None, None, None, None, None, None, rows, columns, mask, C, T, H, W, 1)
        sums += d.to(sums.dtype)
        if POOL > 1:
            code = load_code(code_ptr, rows, read, columns, mask, quads, C)
        for corner in tl.static_range(POOL):
            g = d if POOL == 1 else tl.where(code == corner, d, 0.0)
            places = before_pool(rows, corner, H, W, POOL)
            z = tl.load(z_ptr + (places[:, None] * C + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
            products += (g * (z - center)).to(products.dtype)
    part = (branch * B + clip // V) * parts + part
    store_sums(partial_ptr + part * 2 * C, sums, products, columns, C)


def grad_class(dtype: torch.dtype, C_in: int) -> str:
    precision = precision_class(dtype)
    return f"conv_grad half out{min(max(width_class(C_in), 64), 128)}" if precision == "half" else "conv_grad float32"


def conv_grad(
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    size: Sequence[int],
    weight: Tensor,
    h: Tensor | None,
    h_scale: Tensor | None,
    h_shift: Tensor | None,
    matrix: Tensor | None,
    center: Tensor | None,
    const: Tensor | None,
    residual: Tensor | None,
    residual_y: Tensor | None,
    residual_code: Tensor | None,
    residual_pool: int,
    relu: bool,
    z_center: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B = d.shape[0]
    V, kernel, C_out, C_in = weight.shape
    T, H, W = size
    out = d.new_empty((B, V, T, H, W, C_in))
    tile = choose_tile(grad_class(d.dtype, C_in), B * V * T * H * W, d.device)
    row_tiles = triton.cdiv(T * H * W, tile["BLOCK_M"])
    sums = z_center is not None
    partial = d.new_empty((V, B * row_tiles, 2, C_in if sums else 0), dtype=accumulator(d.dtype))
    even = C_out % tile["BLOCK_K"] == 0 and C_in % tile["BLOCK_N"] == 0
    even = even and (matrix is None or C_in % tile["BLOCK_K"] == 0)
    if B:
        with torch.cuda.device_of(d):
            _conv_grad_kernel[(row_tiles * triton.cdiv(C_in, tile["BLOCK_N"]) * B * V,)](
                d, y, code, z, coef, weight, h, h_scale, h_shift, matrix, center, const,
                residual, residual_y, residual_code, z_center, out, partial if sums else None,
                B, V, C_out, C_in, T * H * W, T, H, W,
                POOL=pool, RESIDUAL_POOL=residual_pool, KERNEL=kernel, RELU=relu, EVEN=even, **tile,
            )  # fmt: skip
    return out, partial.sum(1, dtype=torch.float64)


def grad_sums(d: Tensor, y: Tensor | None, code: Tensor | None, pool: int, z: Tensor, center: Tensor) -> Tensor:
    B, V, T, H, W, C = z.shape
    rows = math.prod(pooled_size((T, H, W), pool))
    tile = choose_tile(f"grad_sums {precision_class(d.dtype)}", B * V * T * H * W, d.device)
    parts = triton.cdiv(rows, tile["BLOCK_M"] * tile["STEPS"])
    partial = d.new_empty((V, B * parts, 2, C), dtype=accumulator(d.dtype))
    if B * parts:
        with torch.cuda.device_of(d):
            _grad_sums_kernel[(parts * triton.cdiv(C, tile["BLOCK_N"]) * B * V,)](
                d, y, code, z, center, partial, B, V, C, T * H * W, T, H, W, POOL=pool, **tile
            )
    return partial.sum(1, dtype=torch.float64)


class Call(NamedTuple):
    """What the audit varies in a call of ``conv_grad``."""

    name: str
    C_out: int
    C_in: int
    T: int
    H: int  # and W
    kernel: int = 1
    pool: int = 1
    y: bool = False
    coef: bool = False
    z: bool = True  # where coef is
    h: bool = False
    norm: bool = False  # of h
    matrix: bool = False  # and center and const
    residual: bool = False
    residual_pool: int = 1
    residual_y: bool = False
    relu: bool = False
    sums: bool = False

    def inputs(self, dtype: torch.dtype, B: int, device: torch.device) -> tuple:
        size = (self.T, self.H, self.H)

        def rows(C, pool=1, wanted=True):
            shape = (B, BRANCHES, *pooled_size(size, pool), C)
            return randn(*shape, device=device, dtype=dtype) if wanted else None

        def code(C, pool):
            shape = (B, BRANCHES, *pooled_size(size, pool), -(-C // 4))
            return torch.zeros(shape, device=device, dtype=torch.uint8) if pool > 1 else None

        def channels(*shape, wanted):
            return randn(*shape, device=device) if wanted else None

        C_out, C_in, V = self.C_out, self.C_in, BRANCHES
        matrix = randn(V, C_in, C_in, device=device, dtype=dtype, fan_in=C_in) if self.matrix else None
        return (
            rows(C_out, self.pool), rows(C_out, self.pool, self.y), code(C_out, self.pool), self.pool,
            rows(C_out, 1, self.coef and self.z), channels(4, V, C_out, wanted=self.coef), size,
            randn(V, self.kernel, C_out, C_in, device=device, dtype=dtype, fan_in=C_out * self.kernel),
            rows(C_in, 1, self.h), *(channels(V, C_in, wanted=self.norm) for _ in range(2)), matrix,
            *(channels(V, C_in, wanted=self.matrix) for _ in range(2)),
            rows(C_in, self.residual_pool, self.residual), rows(C_in, self.residual_pool, self.residual_y),
            code(C_in, self.residual_pool), self.residual_pool, self.relu, channels(V, C_in, wanted=self.sums),
        )  # fmt: skip


def calls_of(block: Block) -> Iterator[Call]:
    """A block's backward pass, in scheme "gram" and in "fused"."""
    C, inner, outer, T, H = block.channels_in, block.channels, 4 * block.channels, block.frames, block.size
    pool, c_size = (4, H // 2) if block.pool else (1, H)
    time_pool = 2 if block.time_pool else 1
    masked = {"h": True, "relu": True}
    summed = {**masked, "norm": True, "sums": True}
    yield Call("c, gram", outer, inner, T, c_size, pool=time_pool, y=True, matrix=True, **masked)
    yield Call(
        "c, fused", outer, inner, T, c_size, pool=time_pool, y=True, coef=True, **masked if block.pool else summed
    )
    yield Call("b, gram", inner, inner, T, H, pool=pool, matrix=True, **summed)
    yield Call("b, fused", inner, inner, T, H, pool=pool, coef=True, **summed)
    a = Call("a", inner, C, T, H, kernel=block.kernel, coef=True, residual=True)
    if outer == C:
        yield a._replace(residual_pool=time_pool, residual_y=True)
    else:
        yield a
        yield Call("branch1, gram", outer, C, T, H, pool=max(pool, time_pool), y=True, h=True, matrix=True)
        yield Call("branch1, fused", outer, C, T, H, pool=max(pool, time_pool), y=True, coef=True)


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Every kind of call for every width of a tile: of two blocks all, of others where a tap or an odd end is new."""
    dtype = PRECISIONS[precision]

    def sums_inputs(pool, B, device):
        C, size = 256, (FRAMES, 56, 56)
        shape = (B, BRANCHES, *pooled_size(size, pool))
        d, y = (randn(*shape, C, device=device, dtype=dtype) for _ in range(2))
        code = torch.zeros((*shape, C // 4), device=device, dtype=torch.uint8) if pool > 1 else None
        z = randn(B, BRANCHES, *size, C, device=device, dtype=dtype)
        return d, y, code, pool, z, randn(BRANCHES, C, device=device)

    calls = [*calls_of(Block(256, 64, 3, 32, 56, time_pool=True)), *calls_of(Block(1024, 512, 1, 16, 14, pool=True))]
    # frozen: no moments, so neither a matrix nor z
    calls += [call._replace(name=f"{call.name}, frozen", matrix=False, z=False) for call in calls[:5]]
    for block in (Block(2048, 512, 3, 16, 7), Block(8, 8, 3, 32, 16, time_pool=True)):
        calls += [call for call in calls_of(block) if call.name == "a"]
    for call in calls:
        name = f"{call.name}, {call.C_out} to {call.C_in}, k {call.kernel}, pool {call.pool}"
        yield AuditCase(name, conv_grad, plain.conv_grad, partial(call.inputs, dtype))
    for pool in (1, 2, 4):
        yield AuditCase(f"sums, pool {pool}", grad_sums, plain.grad_sums, partial(sums_inputs, pool), matrix=False)
