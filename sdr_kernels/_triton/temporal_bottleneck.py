"""A whole bottleneck in one kernel, over tiles of output rows.

As in :mod:`sdr_kernels._triton.temporal_conv3d` a row is one (frame, position) and a tap of conv a is a row offset. The
input rows that an output row reduces over, the 4 corners of a 2x2 pool and the 2 frames of a pool over time, are walked
one after the other with a running maximum, so that a pool costs no exchange of data.

Narrow blocks (CHAINED: BLOCK_I covers the inner width) keep a and b in registers. Wide ones split the columns of every
product and hold a tile's a and b in the program's own scratch memory, a few hundred KB that stay in the L2 cache. There
programs are persistent: each owns its scratch and walks over tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._ops import empty_channels_last
from sdr_kernels._tiles import choose_tile, num_processors, precision_class, width_class
from sdr_kernels._triton.temporal_conv3d import add_product, load_columns, pack, relu, rows_of


@triton.jit
def input_rows(out_rows, frame, corner, H, W, POOL: tl.constexpr, TIME_POOL: tl.constexpr):
    """Rows of [T, H, W] that the output rows, of [T', H', W'], take from this frame and this corner of a pool."""
    out_W = W // 2 if POOL else W
    out_frame = (H // 2 if POOL else H) * out_W
    t = out_rows // out_frame
    position = out_rows % out_frame
    if TIME_POOL:
        t = 2 * t + frame
    if POOL:
        position = (2 * (position // out_W) + corner // 2) * W + 2 * (position % out_W) + corner % 2
    return t * (H.to(tl.int64) * W) + position


@triton.jit
def affine(acc, layer, columns, C: tl.constexpr):
    """acc * scale + shift of a (weight, scale, shift)."""
    return acc * load_columns(layer[1], columns, C) + load_columns(layer[2], columns, C)


@triton.jit
def inner_chained(
    x_ptr, out_rows, row_mask, frame, T, H, W, a, b,
    C_IN: tl.constexpr, INNER: tl.constexpr, KERNEL: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(pool(b(relu(a(x))))) of one frame of each output row, [BLOCK_M, BLOCK_I], without leaving registers."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_I).to(tl.int64)
    mask = (columns < INNER)[:, None] & (columns < INNER)[None, :]
    pooled = tl.full((BLOCK_M, BLOCK_I), float("-inf"), tl.float32)
    for corner in range(4 if POOL else 1):
        rows = input_rows(out_rows, frame, corner, H, W, POOL, TIME_POOL)
        acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        acc = add_product(acc, x_ptr, rows, row_mask, T * H * W, H * W, a[0], columns, C_IN, INNER, KERNEL, BLOCK_K)
        acc = relu(affine(acc, a, columns, INNER))
        weight = tl.load(b[0] + (columns[:, None] * INNER + columns[None, :]), mask=mask, other=0.0)
        acc = affine(tl.dot(acc.to(dtype), weight, input_precision="ieee"), b, columns, INNER)
        pooled = tl.maximum(pooled, acc, propagate_nan=tl.PropagateNan.ALL)
    return relu(pooled).to(dtype)


@triton.jit
def inner_to_scratch(
    x_ptr, out_rows, row_mask, frame, T, H, W, a, b, scratch_a, scratch_b,
    C_IN: tl.constexpr, INNER: tl.constexpr, KERNEL: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same by blocks of columns; a and then the result lie in scratch, [BLOCK_M, INNER] each."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    local = tl.arange(0, BLOCK_M).to(tl.int64)
    for corner in range(4 if POOL else 1):
        rows = input_rows(out_rows, frame, corner, H, W, POOL, TIME_POOL)
        for start in range(0, INNER, BLOCK_I):
            columns = start + tl.arange(0, BLOCK_I).to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            acc = add_product(acc, x_ptr, rows, row_mask, T * H * W, H * W, a[0], columns, C_IN, INNER, KERNEL, BLOCK_K)
            acc = relu(affine(acc, a, columns, INNER))
            tl.store(scratch_a + (local[:, None] * INNER + columns[None, :]), acc.to(dtype), mask=(columns < INNER)[None, :])
        tl.debug_barrier()  # b reads what other threads wrote of a
        for start in range(0, INNER, BLOCK_I):
            columns = start + tl.arange(0, BLOCK_I).to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            acc = add_product(acc, scratch_a, local, row_mask, BLOCK_M, 0, b[0], columns, INNER, INNER, 1, BLOCK_K)
            # the ReLU of a maximum is the maximum of the ReLUs
            acc = relu(affine(acc, b, columns, INNER))
            offsets = local[:, None] * INNER + columns[None, :]
            mask = (columns < INNER)[None, :]
            if POOL:
                before = tl.load(scratch_b + offsets, mask=mask & (corner > 0), other=0.0)
                acc = tl.maximum(acc, before.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
            tl.store(scratch_b + offsets, acc.to(dtype), mask=mask)
        tl.debug_barrier()  # the result is complete, and a may be overwritten


@triton.jit
def shortcut_columns(
    x_ptr, out_rows, row_mask, frame, T, H, W, columns, branch1,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr, HAS_BRANCH1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The shortcut of one frame of each output row in some columns, [BLOCK_M, BLOCK_N] float32."""
    if HAS_BRANCH1:
        shortcut = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        for corner in range(4 if POOL else 1):
            rows = input_rows(out_rows, frame, corner, H, W, POOL, TIME_POOL)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = add_product(acc, x_ptr, rows, row_mask, T * H * W, 0, branch1[0], columns, C_IN, C_OUT, 1, BLOCK_K)
            acc = affine(acc, branch1, columns, C_OUT)
            shortcut = tl.maximum(shortcut, acc, propagate_nan=tl.PropagateNan.ALL)
    else:
        rows = input_rows(out_rows, frame, 0, H, W, POOL, TIME_POOL)
        mask = row_mask[:, None] & (columns < C_OUT)[None, :]
        shortcut = tl.load(x_ptr + (rows[:, None] * C_IN + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    return shortcut


@triton.jit
def c_columns(
    h, scratch_b, row_mask, columns, c,
    INNER: tl.constexpr, C_OUT: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c of h, which lies in registers or in scratch, in some columns, [BLOCK_M, BLOCK_N] float32."""
    if CHAINED:
        inner = tl.arange(0, BLOCK_I).to(tl.int64)
        mask = (inner < INNER)[:, None] & (columns < C_OUT)[None, :]
        weight = tl.load(c[0] + (inner[:, None] * C_OUT + columns[None, :]), mask=mask, other=0.0)
        acc = tl.dot(h, weight, input_precision="ieee")
    else:
        local = tl.arange(0, BLOCK_M).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = add_product(acc, scratch_b, local, row_mask, BLOCK_M, 0, c[0], columns, INNER, C_OUT, 1, BLOCK_K)
    return affine(acc, c, columns, C_OUT)


@triton.jit(do_not_specialize=["V", "tiles", "programs", "T", "H", "W"])
def _temporal_bottleneck_fwd_kernel(
    x_ptr,  # [B, V, T, H, W, C_IN]
    a_ptr, a_scale, a_shift,  # [V, KERNEL, C_IN, INNER], [V, INNER], [V, INNER]
    b_ptr, b_scale, b_shift,  # [V, INNER, INNER], [V, INNER], [V, INNER]
    c_ptr, c_scale, c_shift,  # [V, INNER, C_OUT], [V, C_OUT], [V, C_OUT]
    w1_ptr, w1_scale, w1_shift,  # [V, C_IN, C_OUT], [V, C_OUT], [V, C_OUT]; not read without HAS_BRANCH1
    scratch_ptr,  # [programs, 1 + TIME_POOL, 2, BLOCK_M, INNER]; not read where CHAINED
    out_ptr,  # [B, V, T', H', W', C_OUT]
    V, tiles, programs, T, H, W,
    C_IN: tl.constexpr, INNER: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, HAS_BRANCH1: tl.constexpr,
    POOL: tl.constexpr, TIME_POOL: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    T = T.to(tl.int64)
    out_num_rows = (T // 2 if TIME_POOL else T) * (H // 2 if POOL else H) * (W // 2 if POOL else W)
    row_tiles = tl.cdiv(out_num_rows, BLOCK_M)
    half: tl.constexpr = BLOCK_M * INNER
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * ((2 + 2 * TIME_POOL) * half)
    for tile in range(tl.program_id(0), tiles, programs):
        clip = tile // row_tiles  # of B * V
        v = clip % V
        out_rows = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = out_rows < out_num_rows
        x = x_ptr + clip * (T * H * W * C_IN)
        a = (a_ptr + v * (KERNEL * C_IN * INNER), a_scale + v * INNER, a_shift + v * INNER)
        b = (b_ptr + v * (INNER * INNER), b_scale + v * INNER, b_shift + v * INNER)
        c = (c_ptr + v * (INNER * C_OUT), c_scale + v * C_OUT, c_shift + v * C_OUT)
        branch1 = (w1_ptr + v * (C_IN * C_OUT), w1_scale + v * C_OUT, w1_shift + v * C_OUT)
        h0 = 0.0
        h1 = 0.0
        if CHAINED:
            h0 = inner_chained(
                x, out_rows, row_mask, 0, T, H, W, a, b,
                C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
            )  # fmt: skip
            if TIME_POOL:
                h1 = inner_chained(
                    x, out_rows, row_mask, 1, T, H, W, a, b,
                    C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
                )  # fmt: skip
        else:
            for frame in range(1 + TIME_POOL):
                here = scratch + frame * (2 * half)
                inner_to_scratch(
                    x, out_rows, row_mask, frame, T, H, W, a, b, here, here + half,
                    C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
                )  # fmt: skip
        for start in range(0, C_OUT, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
            shortcut = shortcut_columns(
                x, out_rows, row_mask, 0, T, H, W, columns, branch1,
                C_IN, C_OUT, POOL, TIME_POOL, HAS_BRANCH1, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = c_columns(
                h0, scratch + half, row_mask, columns, c,
                INNER, C_OUT, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
            )  # fmt: skip
            out = relu(acc + shortcut)
            if TIME_POOL:
                shortcut = shortcut_columns(
                    x, out_rows, row_mask, 1, T, H, W, columns, branch1,
                    C_IN, C_OUT, POOL, TIME_POOL, HAS_BRANCH1, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = c_columns(
                    h1, scratch + 3 * half, row_mask, columns, c,
                    INNER, C_OUT, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
                )  # fmt: skip
                out = tl.maximum(out, relu(acc + shortcut), propagate_nan=tl.PropagateNan.ALL)
            offsets = (clip * out_num_rows + out_rows)[:, None] * C_OUT + columns[None, :]
            mask = row_mask[:, None] & (columns < C_OUT)[None, :]
            tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        if not CHAINED:
            tl.debug_barrier()  # the next tile overwrites the scratch


def bottleneck_class(dtype: torch.dtype, inner: int) -> str:
    return f"temporal_bottleneck {precision_class(dtype)} inner{width_class(inner)}"


def temporal_bottleneck_fwd(
    x: Tensor,
    a: Tensor, a_scale: Tensor, a_shift: Tensor,
    b: Tensor, b_scale: Tensor, b_shift: Tensor,
    c: Tensor, c_scale: Tensor, c_shift: Tensor,
    branch1: Tensor | None, branch1_scale: Tensor | None, branch1_shift: Tensor | None,
    pool: bool, time_pool: bool,
) -> Tensor:  # fmt: skip
    B, V, C_in, T, H, W = x.shape
    inner, C_out, kernel = a.shape[1], c.shape[1], a.shape[3]
    space, time = 1 + pool, 1 + time_pool
    out = empty_channels_last(x, (B, V, C_out, T // time, H // space, W // space))
    if B == 0:
        return out
    rows = out.numel() // C_out
    tile = choose_tile(bottleneck_class(x.dtype, inner), rows, x.device)
    per_processor = tile.pop("PROGRAMS")
    chained = tile["BLOCK_I"] >= inner
    tiles = triton.cdiv(rows // (B * V), tile["BLOCK_M"]) * B * V
    programs = tiles if chained else min(tiles, per_processor * num_processors(x.device))
    scratch = None if chained else x.new_empty((programs, time, 2, tile["BLOCK_M"], inner))
    # without a shortcut of its own x stands in: its pointers are formed but never read
    shortcut = (x, a_scale, a_shift) if branch1 is None else (pack(branch1), branch1_scale, branch1_shift)
    affines = [t.contiguous() for t in (a_scale, a_shift, b_scale, b_shift, c_scale, c_shift, *shortcut[1:])]
    with torch.cuda.device_of(x):
        _temporal_bottleneck_fwd_kernel[(programs,)](
            rows_of(x), pack(a), *affines[:2], pack(b), *affines[2:4], pack(c), *affines[4:6],
            shortcut[0], *affines[6:], out if scratch is None else scratch, out, V, tiles, programs, T, H, W,
            C_IN=C_in, INNER=inner, C_OUT=C_out, KERNEL=kernel, HAS_BRANCH1=branch1 is not None,
            POOL=pool, TIME_POOL=time_pool, CHAINED=chained, **tile,
        )  # fmt: skip
    return out
