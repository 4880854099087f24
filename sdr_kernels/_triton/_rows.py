"""Rows as training's kernels read them: normed, through a pool, gradients; see :mod:`sdr_kernels._rows`.

Nothing here returns early: Triton compiles what follows a ``return`` under a constant condition all the same. Places in
a clip are divided in 32 bits, several times faster than 64: a clip has less than 2^31 rows.
"""

import triton
import triton.language as tl

from sdr_kernels._triton.temporal_conv3d import relu


@triton.jit
def pooled_rows(T, H, W, POOL: tl.constexpr):
    """Rows of T x H x W after a pool."""
    if POOL == 1:
        rows = T * tl.cast(H, tl.int64) * W
    elif POOL == 2:
        rows = (T // 2) * tl.cast(H, tl.int64) * W
    else:
        rows = T * tl.cast(H // 2, tl.int64) * (W // 2)
    return rows


@triton.jit
def code_bytes(C):
    """Bytes that hold a row's code."""
    return (tl.cast(C, tl.int64) + 3) // 4


@triton.jit
def at(ptr, offset):
    """The pointer moved on; None stays None."""
    moved = None
    if ptr is not None:
        moved = ptr + offset
    return moved


@triton.jit
def load_values(ptr, columns, C):
    """One value a channel as a row, [1, N] float32; None stays None."""
    values = None
    if ptr is not None:
        values = tl.load(ptr + columns, mask=columns < C, other=0.0)[None, :]
    return values


@triton.jit
def normed(x, mask, scale, shift):
    """relu(x * scale + shift) in x's dtype and 0 where the mask is off; x itself, which is 0 there, without a scale.

    x: [M, N]; mask: broadcasts to it; scale, shift: [1, N] float32.
    """
    if scale is not None:
        x = tl.where(mask, relu(x.to(tl.float32) * scale + shift), 0.0).to(x.dtype)
    return x


@triton.jit
def through_pool(rows, T, H, W, POOL: tl.constexpr):
    """Where the pool puts rows of T x H x W: the pooled row, which of its rows each is, and whether it has a place."""
    places = rows.to(tl.int32)
    wide_w = tl.cast(W, tl.int64)
    if POOL == 2:
        positions = H * wide_w
        frame = places // positions.to(tl.int32)
        pooled = rows - (frame.to(tl.int64) - frame // 2) * positions
        corner = frame % 2
        inside = frame < T // 2 * 2
    else:
        line, w = places // W, places % W
        frame, h = line // H, line % H
        pooled = (frame.to(tl.int64) * (H // 2) + h // 2) * (wide_w // 2) + w // 2
        corner = h % 2 * 2 + w % 2
        inside = (h < H // 2 * 2) & (w < W // 2 * 2)
    return pooled, corner, inside


@triton.jit
def before_pool(rows, corner, H, W, POOL: tl.constexpr):
    """The row of T x H x W that is one of those of a pooled row; ``corner`` as in its code."""
    places = rows.to(tl.int32)
    wide_w = tl.cast(W, tl.int64)
    if POOL == 1:
        row = rows
    elif POOL == 2:
        positions = H * wide_w
        frame = places // positions.to(tl.int32)
        row = rows + (frame.to(tl.int64) + corner) * positions
    else:
        line, w = places // (W // 2), places % (W // 2)
        frame, h = line // (H // 2), line % (H // 2)
        row = (frame.to(tl.int64) * H + 2 * h.to(tl.int64) + corner // 2) * wide_w + 2 * w.to(tl.int64) + corner % 2
    return row


@triton.jit
def load_code(code_ptr, pooled, read, columns, mask, quads, C):
    """Which row of its pool each value was, [M, N] int32.

    pooled: [M] of code_ptr's rows; read: [M], where there is one; columns: [N], mask: [M, N], for bytes read once a
    channel; quads: [N / 4], the bytes themselves, where columns follow each other from a multiple of 4, or None.
    """
    bytes_of_code = code_bytes(tl.cast(C, tl.int64))
    if quads is None:
        packed = tl.load(code_ptr + (pooled[:, None] * bytes_of_code + columns[None, :] // 4), mask=mask, other=0)
        code = packed.to(tl.int32) >> (columns[None, :] % 4 * 2).to(tl.int32)
    else:
        mask = read[:, None] & (quads < bytes_of_code)[None, :]
        packed = tl.load(code_ptr + (pooled[:, None] * bytes_of_code + quads[None, :]), mask=mask, other=0)
        parts = packed.to(tl.int32)[:, :, None] >> (tl.arange(0, 4) * 2)[None, None, :]
        code = tl.reshape(parts, (pooled.shape[0], columns.shape[0]))
    return code & 3


@triton.jit
def load_gradient(
    d_ptr, y_ptr, code_ptr, z_ptr, factor, slope, offset, center, rows, columns, mask, C, T, H, W, POOL: tl.constexpr,
    quads=None,
):  # fmt: skip
    """Gradient rows, [M, N] float32, 0 where the mask is off.

    d_ptr, y_ptr, code_ptr: of the clip's and branch's first pooled row; z_ptr: of its first row; rows: [M] int64 of
    T x H x W; columns: [N] int64 of C channels; factor, slope, offset, center: [1, N] float32, or None for no norm;
    quads: [N / 4] int64, the bytes of code that hold the columns, spares reading a byte four times; None where the
    columns do not follow each other from a multiple of 4.
    """
    offsets = rows[:, None] * C + columns[None, :]
    if POOL == 1:
        g = tl.load(d_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            g = tl.where(tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, g)
    else:
        pooled, corner, inside = through_pool(rows, T, H, W, POOL)
        pooled_offsets = pooled[:, None] * C + columns[None, :]
        read = mask & inside[:, None]
        g = tl.load(d_ptr + pooled_offsets, mask=read, other=0.0).to(tl.float32)
        if y_ptr is not None:
            g = tl.where(tl.load(y_ptr + pooled_offsets, mask=read, other=0.0).to(tl.float32) <= 0, 0.0, g)
        # no mask of loads: one that differs between neighbours would have every value loaded on its own
        inside = inside & (rows >= 0) & (rows < T * tl.cast(H, tl.int64) * W)
        code = load_code(code_ptr, pooled, inside, columns, read, quads, C)
        g = tl.where(code == corner[:, None], g, 0.0)
    if factor is not None:
        g = g * factor + offset
        if z_ptr is not None:
            z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            g += (z - center) * slope
        g = tl.where(mask, g, 0.0)
    return g


@triton.jit
def pack_code(code, M: tl.constexpr, N: tl.constexpr):
    """[M, N] of 0..3 to [M, N / 4] bytes, the first channel in the lowest bits."""
    parts = tl.reshape(code.to(tl.int32), (M, N // 4, 4))
    return tl.sum(parts << (tl.arange(0, 4) * 2)[None, None, :], 2).to(tl.uint8)
