"""A whole bottleneck in one kernel, over tiles of output rows.

As in :mod:`sdr_kernels._triton.temporal_conv3d` a row is one (frame, position) and a tap of conv a is a row offset. The
input rows that an output row reduces over, the 4 corners of a 2x2 pool and the 2 frames of a pool over time, are walked
one after the other with a running maximum, so that a pool costs no exchange of data.

Narrow blocks (CHAINED: BLOCK_I covers the inner width) keep a and b in registers. Wide ones split the columns of every
product and hold a tile's a and b in the program's own scratch memory, a few hundred KB that stay in the L2 cache. There
programs are persistent: each owns its scratch and walks over tiles.

Registers decide the tile, and two things keep them low: bounds of loops are arguments (``size``), since LLVM unrolls
loops whose short length it knows; and a barrier ends each step over the corners of a pool, since without one the
channels' scales and shifts are loaded before the loop and held.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BLOCKS, BRANCHES, PRECISIONS, AuditCase, Block, randn
from sdr_kernels._ops import channels_last, empty_channels_last
from sdr_kernels._tiles import choose_tile, num_processors, precision_class, width_class
from sdr_kernels._triton.temporal_conv3d import add_product, load_columns, pack, relu, rows_of
from sdr_kernels.temporal_bottleneck import FoldedConv, temporal_bottleneck_reference


@triton.jit
def input_rows(out_rows, frame, corner, size, POOL: tl.constexpr, TIME_POOL: tl.constexpr):
    """Rows of [T, H, W] that the output rows, of [T', H', W'], take from this frame and this corner of a pool."""
    if not POOL and not TIME_POOL:
        return out_rows
    _, H, W, _, _, _, _ = size
    out_W = W // 2 if POOL else W
    out_frame = (H // 2 if POOL else H) * out_W
    t = out_rows // out_frame
    position = out_rows % out_frame
    if TIME_POOL:
        t = 2 * t + frame
    if POOL:
        h = 2 * (position // out_W) + corner // 2
        return (t * H + h) * W + 2 * (position % out_W) + corner % 2
    else:
        return t * H * W + position


@triton.jit
def affine(acc, layer, columns, C: tl.constexpr):
    """acc * scale + shift of a (weight, scale, shift)."""
    return acc * load_columns(layer[1], columns, C) + load_columns(layer[2], columns, C)


@triton.jit
def inner_chained(
    x_ptr, out_rows, row_mask, frame, size, a, b,
    C_IN: tl.constexpr, INNER: tl.constexpr, KERNEL: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(pool(b(relu(a(x))))) of one frame of each output row, [BLOCK_M, BLOCK_I], without leaving registers."""
    T, H, W, corners, c_in, _, _ = size
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_I).to(tl.int64)
    mask = (columns < INNER)[:, None] & (columns < INNER)[None, :]
    pooled = tl.full((BLOCK_M, BLOCK_I), float("-inf"), tl.float32)
    for corner in range(corners if POOL else 1):
        rows = input_rows(out_rows, frame, corner, size, POOL, TIME_POOL)
        acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        acc = add_product(
            acc, x_ptr, rows, row_mask, T * H * W, H * W,
            a[0], columns, c_in, C_IN, INNER, KERNEL, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        acc = relu(affine(acc, a, columns, INNER))
        if INNER != BLOCK_I:  # columns of padding: an Inf of x is NaN there, and would spread in the next product
            acc = tl.where((columns < INNER)[None, :], acc, 0.0)
        weight = tl.load(b[0] + (columns[:, None] * INNER + columns[None, :]), mask=mask, other=0.0)
        acc = affine(tl.dot(acc.to(dtype), weight, input_precision="ieee"), b, columns, INNER)
        pooled = tl.maximum(pooled, acc, propagate_nan=tl.PropagateNan.ALL)
        if POOL:
            tl.debug_barrier()
    if INNER != BLOCK_I:
        pooled = tl.where((columns < INNER)[None, :], pooled, 0.0)
    return relu(pooled).to(dtype)


@triton.jit
def inner_to_scratch(
    x_ptr, out_rows, row_mask, frame, size, a, b, scratch_a, scratch_b,
    C_IN: tl.constexpr, INNER: tl.constexpr, KERNEL: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same by blocks of columns; a and then the result lie in scratch, [BLOCK_M, INNER] each."""
    T, H, W, corners, c_in, inner, _ = size
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    local = tl.arange(0, BLOCK_M).to(tl.int64)
    for corner in range(corners if POOL else 1):
        rows = input_rows(out_rows, frame, corner, size, POOL, TIME_POOL)
        for start in range(0, inner, BLOCK_I):
            columns = start + tl.arange(0, BLOCK_I).to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            acc = add_product(
                acc, x_ptr, rows, row_mask, T * H * W, H * W,
                a[0], columns, c_in, C_IN, INNER, KERNEL, BLOCK_I, BLOCK_K,
            )  # fmt: skip
            acc = relu(affine(acc, a, columns, INNER)).to(dtype)
            tl.store(scratch_a + (local[:, None] * INNER + columns[None, :]), acc, mask=(columns < INNER)[None, :])
        tl.debug_barrier()  # b reads what other threads wrote of a
        for start in range(0, inner, BLOCK_I):
            columns = start + tl.arange(0, BLOCK_I).to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            acc = add_product(
                acc, scratch_a, local, row_mask, BLOCK_M, 0, b[0], columns, inner, INNER, INNER, 1, BLOCK_I, BLOCK_K
            )
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
def branch1_columns(
    x_ptr, out_rows, row_mask, frame, size, columns, branch1,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, POOL: tl.constexpr, TIME_POOL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pool(branch1(x)) of one frame of each output row in some columns, [BLOCK_M, BLOCK_N] float32."""
    T, H, W, corners, c_in, _, _ = size
    pooled = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for corner in range(corners if POOL else 1):
        rows = input_rows(out_rows, frame, corner, size, POOL, TIME_POOL)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = add_product(
            acc, x_ptr, rows, row_mask, T * H * W, 0, branch1[0], columns, c_in, C_IN, C_OUT, 1, BLOCK_N, BLOCK_K
        )
        pooled = tl.maximum(pooled, affine(acc, branch1, columns, C_OUT), propagate_nan=tl.PropagateNan.ALL)
        if POOL:
            tl.debug_barrier()
    return pooled


@triton.jit
def c_columns(
    h, scratch_b, row_mask, size, columns, c,
    INNER: tl.constexpr, C_OUT: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c of h, which lies in registers or in scratch, in some columns, [BLOCK_M, BLOCK_N] float32."""
    if CHAINED:
        k = tl.arange(0, BLOCK_I).to(tl.int64)
        mask = (k < INNER)[:, None] & (columns < C_OUT)[None, :]
        weight = tl.load(c[0] + (k[:, None] * C_OUT + columns[None, :]), mask=mask, other=0.0)
        acc = tl.dot(h, weight, input_precision="ieee")
    else:
        local = tl.arange(0, BLOCK_M).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = add_product(
            acc, scratch_b, local, row_mask, BLOCK_M, 0, c[0], columns, size[5], INNER, C_OUT, 1, BLOCK_N, BLOCK_K
        )
    return affine(acc, c, columns, C_OUT)


@triton.jit
def out_columns(
    h, scratch_b, x_ptr, out_rows, row_mask, frame, size, columns, c, branch1,
    C_IN: tl.constexpr, INNER: tl.constexpr, C_OUT: tl.constexpr, HAS_BRANCH1: tl.constexpr,
    POOL: tl.constexpr, TIME_POOL: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(c(h) + shortcut) of one frame of each output row in some columns, [BLOCK_M, BLOCK_N] float32."""
    # the order that holds the fewest registers during a product
    if HAS_BRANCH1:
        shortcut = branch1_columns(
            x_ptr, out_rows, row_mask, frame, size, columns, branch1,
            C_IN, C_OUT, POOL, TIME_POOL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc = c_columns(h, scratch_b, row_mask, size, columns, c, INNER, C_OUT, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K)
    if not HAS_BRANCH1:
        rows = input_rows(out_rows, frame, 0, size, POOL, TIME_POOL)
        mask = row_mask[:, None] & (columns < C_OUT)[None, :]
        shortcut = tl.load(x_ptr + (rows[:, None] * C_IN + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    return relu(acc + shortcut)


@triton.jit
def bottleneck_tile(
    tile, V, size, x_ptr, a, b, c, branch1, scratch, out_ptr,
    C_IN: tl.constexpr, INNER: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, HAS_BRANCH1: tl.constexpr,
    POOL: tl.constexpr, TIME_POOL: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output rows of one clip and branch in all their columns."""
    T, H, W, _, _, _, c_out = size
    out_num_rows = (T // 2 if TIME_POOL else T) * (H // 2 if POOL else H) * (W // 2 if POOL else W)
    row_tiles = tl.cdiv(out_num_rows, BLOCK_M)
    clip = tile // row_tiles  # of B * V
    v = clip % V
    out_rows = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = out_rows < out_num_rows
    x_ptr += clip * (T * H * W * C_IN)
    a = (a[0] + v * (KERNEL * C_IN * INNER), a[1] + v * INNER, a[2] + v * INNER)
    b = (b[0] + v * (INNER * INNER), b[1] + v * INNER, b[2] + v * INNER)
    c = (c[0] + v * (INNER * C_OUT), c[1] + v * C_OUT, c[2] + v * C_OUT)
    branch1 = (branch1[0] + v * (C_IN * C_OUT), branch1[1] + v * C_OUT, branch1[2] + v * C_OUT)
    part: tl.constexpr = BLOCK_M * INNER
    h0 = 0.0
    h1 = 0.0
    if CHAINED:
        h0 = inner_chained(
            x_ptr, out_rows, row_mask, 0, size, a, b,
            C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        if TIME_POOL:
            h1 = inner_chained(
                x_ptr, out_rows, row_mask, 1, size, a, b,
                C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
            )  # fmt: skip
    else:
        for frame in range(1 + TIME_POOL):
            here = scratch + frame * (2 * part)
            inner_to_scratch(
                x_ptr, out_rows, row_mask, frame, size, a, b, here, here + part,
                C_IN, INNER, KERNEL, POOL, TIME_POOL, BLOCK_M, BLOCK_I, BLOCK_K,
            )  # fmt: skip
    for start in range(0, c_out, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
        out = out_columns(
            h0, scratch + part, x_ptr, out_rows, row_mask, 0, size, columns, c, branch1,
            C_IN, INNER, C_OUT, HAS_BRANCH1, POOL, TIME_POOL, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        if TIME_POOL:
            other = out_columns(
                h1, scratch + 3 * part, x_ptr, out_rows, row_mask, 1, size, columns, c, branch1,
                C_IN, INNER, C_OUT, HAS_BRANCH1, POOL, TIME_POOL, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
            )  # fmt: skip
            out = tl.maximum(out, other, propagate_nan=tl.PropagateNan.ALL)
        offsets = (clip * out_num_rows + out_rows)[:, None] * C_OUT + columns[None, :]
        mask = row_mask[:, None] & (columns < C_OUT)[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["V", "tiles", "T", "H", "W", "corners", "c_in", "inner", "c_out"])
def _temporal_bottleneck_fwd_kernel(
    x_ptr,  # [B, V, T, H, W, C_IN]
    a_ptr, a_scale, a_shift,  # [V, KERNEL, C_IN, INNER], [V, INNER], [V, INNER]
    b_ptr, b_scale, b_shift,  # [V, INNER, INNER], [V, INNER], [V, INNER]
    c_ptr, c_scale, c_shift,  # [V, INNER, C_OUT], [V, C_OUT], [V, C_OUT]
    w1_ptr, w1_scale, w1_shift,  # [V, C_IN, C_OUT], [V, C_OUT], [V, C_OUT]; not read without HAS_BRANCH1
    scratch_ptr,  # [programs, 1 + TIME_POOL, 2, BLOCK_M, INNER]; not read where CHAINED
    out_ptr,  # [B, V, T', H', W', C_OUT]
    V, tiles,
    T, H, W, corners, c_in, inner, c_out,  # corners: 4 with POOL, else 1; the last three as their constants
    C_IN: tl.constexpr, INNER: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, HAS_BRANCH1: tl.constexpr,
    POOL: tl.constexpr, TIME_POOL: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    size = (tl.cast(T, tl.int64), tl.cast(H, tl.int64), tl.cast(W, tl.int64), corners, c_in, inner, c_out)
    a, b, c = (a_ptr, a_scale, a_shift), (b_ptr, b_scale, b_shift), (c_ptr, c_scale, c_shift)
    branch1 = (w1_ptr, w1_scale, w1_shift)
    program = tl.program_id(0).to(tl.int64)
    if CHAINED:
        bottleneck_tile(
            program, V, size, x_ptr, a, b, c, branch1, scratch_ptr, out_ptr,
            C_IN, INNER, C_OUT, KERNEL, HAS_BRANCH1, POOL, TIME_POOL, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
        )  # fmt: skip
    else:
        scratch = scratch_ptr + program * ((2 + 2 * TIME_POOL) * BLOCK_M * INNER)
        for tile in range(program, tiles, tl.num_programs(0)):
            bottleneck_tile(
                tile, V, size, x_ptr, a, b, c, branch1, scratch, out_ptr,
                C_IN, INNER, C_OUT, KERNEL, HAS_BRANCH1, POOL, TIME_POOL, CHAINED, BLOCK_M, BLOCK_N, BLOCK_I, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()  # the next tile overwrites the scratch


def bottleneck_class(dtype: torch.dtype, inner: int, pool: bool) -> str:
    return f"temporal_bottleneck {precision_class(dtype)} inner{width_class(inner)}{' pool' if pool else ''}"


def packed(weight: Tensor, scale: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer in the kernel's order of memory."""
    return pack(weight), torch.ones_like(shift) if scale is None else scale.contiguous(), shift.contiguous()


def temporal_bottleneck_fwd(
    x: Tensor,
    a: Tensor, a_scale: Tensor | None, a_shift: Tensor,
    b: Tensor, b_scale: Tensor | None, b_shift: Tensor,
    c: Tensor, c_scale: Tensor | None, c_shift: Tensor,
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
    tile = choose_tile(bottleneck_class(x.dtype, inner, pool), rows, x.device)
    per_processor = tile.pop("PROGRAMS")
    chained = tile["BLOCK_I"] >= inner
    tiles = triton.cdiv(rows // (B * V), tile["BLOCK_M"]) * B * V
    programs = tiles if chained else min(tiles, per_processor * num_processors(x.device))
    scratch = out if chained else x.new_empty((programs, time, 2, tile["BLOCK_M"], inner))
    layers = [packed(a, a_scale, a_shift), packed(b, b_scale, b_shift), packed(c, c_scale, c_shift)]
    # without a branch1 a stands in for it: addresses are formed but never read
    layers.append(layers[0] if branch1 is None else packed(branch1, branch1_scale, branch1_shift))
    with torch.cuda.device_of(x):
        _temporal_bottleneck_fwd_kernel[(programs,)](
            rows_of(x), *chain(*layers), scratch, out,
            V, tiles, T, H, W, 4 if pool else 1, C_in, inner, C_out,
            C_IN=C_in, INNER=inner, C_OUT=C_out, KERNEL=kernel, HAS_BRANCH1=branch1 is not None,
            POOL=pool, TIME_POOL=time_pool, CHAINED=chained, **tile,
        )  # fmt: skip
    return out


def bottleneck_reference(x, *arguments) -> Tensor:
    *layers, pool, time_pool = arguments
    a, b, c, branch1 = (FoldedConv(*layers[i : i + 3]) for i in range(0, 12, 3))
    return temporal_bottleneck_reference(x, a, b, c, None if branch1.weight is None else branch1, pool, time_pool)


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Every block of the shipped models, and one of each class that they skip."""
    dtype = PRECISIONS[precision]

    def inputs(block, B, device):
        C_in, inner, C_out, T, H = block.channels_in, block.channels, 4 * block.channels, block.frames, block.size
        x = channels_last(randn(B, BRANCHES, C_in, T, H, H, device=device, dtype=dtype))
        layers = []
        for out_channels, channels, k in (
            (inner, C_in, block.kernel),
            (inner, inner, 1),
            (C_out, inner, 1),
            (C_out, C_in, 1),
        ):
            weight = randn(BRANCHES, out_channels, channels, k, device=device, dtype=dtype, fan_in=channels * k)
            layers += [weight, *(randn(BRANCHES, out_channels, device=device) for _ in range(2))]
        if C_in == C_out:
            layers[9:] = [None, None, None]
        return x, *layers, block.pool, block.time_pool

    unused = (Block(128, 32, 3, 16, 28), Block(64, 32, 3, 16, 28, pool=True), Block(128, 64, 3, 16, 28, pool=True))
    for block in (*BLOCKS, *unused):
        pools = ", pool" * block.pool + ", pool over time" * block.time_pool
        name = f"{block.channels_in} to {4 * block.channels}, k {block.kernel}{pools}"
        yield AuditCase(name, temporal_bottleneck_fwd, bottleneck_reference, partial(inputs, block))
