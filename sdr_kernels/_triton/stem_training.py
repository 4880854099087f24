"""The stem of training: moments of patches, the maximum and where it was, and products at those places.

A patch is a pixel's 3 colours at ``kernel_size`` frames, at most 15 numbers, so that a tile of patches is [16, pixels].
The window of a result is 3x3 cells of 2x2 pixels at a stride of 2 cells, walked in the order of its code.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, FRAMES, PRECISIONS, STEMS, AuditCase, randn
from sdr_kernels._cpu import stem_training as plain
from sdr_kernels._rows import accumulator, wide
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels._triton.temporal_conv3d import relu

STRIDES = ["stride_b", "stride_v", "stride_c", "stride_t", "stride_h", "stride_w"]


@triton.jit
def patch_taps(t, T, stride_c, stride_t, KERNEL: tl.constexpr):
    """Offsets of the numbers of frame t's patch from pixel 0 of frame 0, in weight's order, and which exist, [16]."""
    tap = tl.arange(0, 16)
    frame = t + tap % KERNEL - KERNEL // 2
    offsets = (tap // KERNEL) * tl.cast(stride_c, tl.int64) + frame * stride_t
    return offsets, (tap < 3 * KERNEL) & (frame >= 0) & (frame < T)


@triton.jit
def cell_of(cell, row, column, H, W):
    """Row and column in the window, 0 to 2, of a cell of 2x2 pixels; of the next one inside where it is outside, [M].

    Cells then still come in order, some more than once: the first maximum is none the wiser.
    """
    last_i = tl.where(row * 2 + 1 < H // 2, 2, 1)
    last_j = tl.where(column * 2 + 1 < W // 2, 2, 1)
    i = tl.minimum(tl.maximum(cell // 3, tl.where(row == 0, 1, 0)), last_i)
    j = tl.minimum(tl.maximum(cell % 3, tl.where(column == 0, 1, 0)), last_j)
    return i, j


@triton.jit
def cell_offset(cell, row, column, H, W, stride_h, stride_w):
    """From the window's first pixel to the cell's, as a row, [1, M]."""
    i, j = cell_of(cell, row, column, H, W)
    return (i.to(tl.int64) * 2 * stride_h + j.to(tl.int64) * 2 * stride_w)[None, :]


@triton.jit
def load_patches(ptrs, tap_mask, other, offset, CORNER: tl.constexpr, stride_h, stride_w):
    """The patches of one of a cell's pixels, [16, M]; ptrs: of the window's first pixel; offset: [1, M] to the cell."""
    pixel = offset + (CORNER // 2 * tl.cast(stride_h, tl.int64) + CORNER % 2 * tl.cast(stride_w, tl.int64))
    return tl.load(ptrs + pixel, mask=tap_mask[:, None], other=other)


@triton.jit(do_not_specialize=["B", "V", "T", "H", "W", *STRIDES])
def _patch_moments_kernel(
    x_ptr,  # [B, V, 3, T, H, W] by its strides
    pivot_ptr,  # [V, 3], subtracted from pixels in float64, as products then are; or None
    partial_ptr,  # [shares, V, 16, 16] float64
    B, V, T, H, W, stride_b, stride_v, stride_c, stride_t, stride_h, stride_w,
    KERNEL: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(0).to(tl.int64) % V
    share = tl.program_id(0).to(tl.int64) // V
    pixels = H.to(tl.int64) * W
    tiles = tl.cdiv(pixels, BLOCK_M)
    tap = tl.arange(0, 16)
    if pivot_ptr is not None:
        pivot = tl.load(pivot_ptr + (branch * 3 + tap // KERNEL), mask=tap < 3 * KERNEL, other=0.0)[:, None]
    acc = tl.zeros((16, 16), tl.float64)
    for tile in range(share * SHARE, tl.minimum((share + 1) * SHARE, B * tiles)):
        pixel = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_mask = (pixel < pixels)[None, :]
        # a patch's last number is free: as 1 it makes the last row of the products the sums
        one = (tap == 15)[:, None] & pixel_mask
        pixel_offsets = pixel // W * stride_h + pixel % W * stride_w + tile // tiles * stride_b + branch * stride_v
        ptrs = x_ptr + pixel_offsets[None, :]
        offsets, taps = patch_taps(tl.cast(0, tl.int64), T, stride_c, stride_t, KERNEL)
        x = tl.load(ptrs + offsets[:, None], mask=taps[:, None] & pixel_mask, other=0.0)
        for t in range(T):  # the same pixels over time: all but the newest of a patch's frames are in L1
            current = x
            if pivot_ptr is not None:
                current = tl.where(pixel_mask, current.to(tl.float64) - pivot, 0.0)
            current = tl.where(one, 1.0, current)
            if pivot_ptr is None:
                current = current.to(x.dtype)
            offsets, taps = patch_taps(tl.cast(t, tl.int64) + 1, T, stride_c, stride_t, KERNEL)
            x = tl.load(ptrs + offsets[:, None], mask=taps[:, None] & pixel_mask, other=0.0)
            # without a pivot float32, for few pixels at a time: tensor cores cut sums off, and changes are differences
            acc += tl.dot(current, tl.trans(current), input_precision="ieee").to(tl.float64)
    index = (share * V + branch) * 256 + (tap[:, None] * 16 + tap[None, :])
    tl.store(partial_ptr + index, acc)


@triton.jit
def argmax_of_window(ptrs, tap_mask, row, column, H, W, stride_h, stride_w, w):
    """Maximum of the convolution over a result's window and the code of the first pixel that has it, [M, N].

    ptrs: [16, M], of the patch of the window's first pixel; row, column: [M] of the result; w: [16, N].
    """
    best = tl.full((row.shape[0], w.shape[1]), float("-inf"), tl.float32)
    step_of_best = tl.zeros((row.shape[0], w.shape[1]), tl.int32)
    offset = cell_offset(0, row, column, H, W, stride_h, stride_w)
    x = load_patches(ptrs, tap_mask, 0.0, offset, 0, stride_h, stride_w)
    for cell in range(9):
        for corner in tl.static_range(4):
            current = x
            # the next pixel ahead of this one's product, which hides its latency; the last is read for nothing
            if corner == 3:
                offset = cell_offset(cell + 1, row, column, H, W, stride_h, stride_w)
            x = load_patches(ptrs, tap_mask, 0.0, offset, (corner + 1) % 4, stride_h, stride_w)
            product = tl.dot(tl.trans(current), w, input_precision="ieee")
            step_of_best = tl.where(product > best, 4 * cell + corner, step_of_best)
            best = tl.maximum(best, product, propagate_nan=tl.PropagateNan.ALL)
    i, j = cell_of(step_of_best // 4, row[:, None], column[:, None], H, W)
    return best, 4 * (3 * i + j) + step_of_best % 4


@triton.jit(do_not_specialize=["V", "T", "H", "W", *STRIDES])
def _stem_max_kernel(
    x_ptr,  # [B, V, 3, T, H, W] by its strides
    w_ptr,  # [V, C, 3, KERNEL]
    scale_ptr, shift_ptr,  # [V, C] float32
    out_ptr, code_ptr,  # [B, V, T, positions, C]
    V, T, H, W, C, stride_b, stride_v, stride_c, stride_t, stride_h, stride_w,
    KERNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    out_w = (W // 2 + 1) // 2
    positions = ((H // 2 + 1) // 2).to(tl.int64) * out_w
    column_tiles = tl.cdiv(C, BLOCK_N)
    tiles = tl.cdiv(positions, BLOCK_M) * column_tiles
    frame = tl.program_id(0).to(tl.int64) // tiles  # of B * V * T
    clip, t = frame // T, frame % T
    branch = clip % V
    tile = tl.program_id(0) % tiles
    position = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    column_mask = columns < C
    offsets, tap_mask = patch_taps(t, T, stride_c, stride_t, KERNEL)
    branch_columns = branch * C + columns
    scale = tl.load(scale_ptr + branch_columns, mask=column_mask, other=0.0)
    sign = (scale > 0).to(tl.float32) - (scale < 0).to(tl.float32)
    w_ptrs = w_ptr + (branch_columns[None, :] * (3 * KERNEL) + tl.arange(0, 16)[:, None])
    w = tl.load(w_ptrs, mask=tap_mask[:, None] & column_mask[None, :], other=0.0)
    w = (w.to(tl.float32) * sign[None, :]).to(w_ptr.dtype.element_ty)
    # past the end the last result again, whose pixels exist
    row, column = tl.minimum(position, positions - 1) // out_w, tl.minimum(position, positions - 1) % out_w
    corner = (row * 4 - 2) * stride_h + (column * 4 - 2) * stride_w
    x_ptr += clip // V * stride_b + branch * stride_v
    best, code = argmax_of_window(
        x_ptr + (offsets[:, None] + corner[None, :]), tap_mask, row, column, H, W, stride_h, stride_w, w
    )
    scale = tl.abs(tl.load(scale_ptr + branch_columns, mask=column_mask, other=0.0))
    shift = tl.load(shift_ptr + branch_columns, mask=column_mask, other=0.0)
    best = relu(best * scale[None, :] + shift[None, :])
    out_offsets = (frame * positions + position)[:, None] * C + columns[None, :]
    mask = (position < positions)[:, None] & column_mask[None, :]
    tl.store(out_ptr + out_offsets, best.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + out_offsets, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["B", "V", "T", "H", "W", *STRIDES])
def _stem_products_kernel(
    x_ptr,  # [B, V, 3, T, H, W] by its strides
    d_ptr, y_ptr, code_ptr,  # [B, V, T, positions, C]
    partial_ptr,  # [shares, V, C, 16] float32, or float64 for float32 rows
    B, V, T, H, W, C, stride_b, stride_v, stride_c, stride_t, stride_h, stride_w,
    KERNEL: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    out_w = (W // 2 + 1) // 2
    positions = ((H // 2 + 1) // 2).to(tl.int64) * out_w
    tiles = tl.cdiv(positions, BLOCK_M)
    column_tiles = tl.cdiv(C, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    branch = program // column_tiles % V
    share = program // column_tiles // V
    one = (tl.arange(0, 16) == 15).to(x_ptr.dtype.element_ty)[:, None]  # a patch's last number, which is free
    acc = tl.zeros((BLOCK_N, 16), partial_ptr.dtype.element_ty)
    for tile in range(share * SHARE, tl.minimum((share + 1) * SHARE, B * T * tiles)):
        clip, t = tile // tiles // T, tile // tiles % T
        position = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = ((clip * V + branch) * T + t) * positions + position
        mask = (position < positions)[:, None] & (columns < C)[None, :]
        d_offsets = rows[:, None] * C + columns[None, :]
        y = tl.load(y_ptr + d_offsets, mask=mask, other=0.0)
        d = tl.load(d_ptr + d_offsets, mask=mask, other=0.0).to(tl.float32)
        code = tl.load(code_ptr + d_offsets, mask=mask, other=0).to(tl.int32)
        code = tl.where(y <= 0, -1, code)  # nowhere
        # past the end the last result again, whose pixels exist
        row, column = tl.minimum(position, positions - 1) // out_w, tl.minimum(position, positions - 1) % out_w
        offsets, tap_mask = patch_taps(t, T, stride_c, stride_t, KERNEL)
        corner_pixel = (row * 4 - 2) * stride_h + (column * 4 - 2) * stride_w + clip * stride_b + branch * stride_v
        ptrs = x_ptr + (offsets[:, None] + corner_pixel[None, :])
        offset = cell_offset(0, row, column, H, W, stride_h, stride_w)
        x = load_patches(ptrs, tap_mask, one, offset, 0, stride_h, stride_w)
        for cell in range(9):
            for corner in tl.static_range(4):  # every pixel's patches times the gradients that go there
                current = x
                if corner == 3:
                    offset = cell_offset(cell + 1, row, column, H, W, stride_h, stride_w)
                x = load_patches(ptrs, tap_mask, one, offset, (corner + 1) % 4, stride_h, stride_w)
                g = tl.where(code == 4 * cell + corner, d, 0.0).to(current.dtype)
                if partial_ptr.dtype.element_ty == tl.float64:
                    acc += tl.dot(tl.trans(g), tl.trans(current), input_precision="ieee")
                else:
                    acc = tl.dot(tl.trans(g), tl.trans(current), acc, input_precision="ieee")
    offsets = ((share * V + branch) * C + columns)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(partial_ptr + offsets, acc, mask=(columns < C)[:, None])


def stem_class(op: str, dtype: torch.dtype, channels: int) -> str:
    return f"{op} {precision_class(dtype)} out{16 if channels <= 16 else 64}"


def patch_covariance(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    B, V, _, T, H, W = x.shape
    if B == 0:
        return wide(x, V, 3 * kernel_size, 3 * kernel_size).zero_(), wide(x, V, 3 * kernel_size).zero_()
    tile = choose_tile(f"patch_covariance {precision_class(x.dtype)}", B * V * T * H * W, x.device)
    partial = wide(x, triton.cdiv(B * triton.cdiv(H * W, tile["BLOCK_M"]), tile["SHARE"]), V, 16, 16)
    pivot = None
    # float32 pixels, whose products float32 would round: float64 ones, about a pivot, so that no mean is too large
    if x.dtype == torch.float32:
        # of a copy: the order of a sum in torch, and so its last bit, depends on strides
        pivot = x[0, :, :, 0].contiguous().mean((-2, -1)).nan_to_num(0, 0, 0)
    with torch.cuda.device_of(x):
        _patch_moments_kernel[(partial.shape[0] * V,)](
            x, pivot, partial, B, V, T, H, W, *x.stride(), KERNEL=kernel_size, **tile
        )
    moments = partial.sum(0) / (B * T * H * W)
    mean = moments[:, 15, : 3 * kernel_size].contiguous()
    covariance = moments[:, : 3 * kernel_size, : 3 * kernel_size] - mean[:, :, None] * mean[:, None, :]
    return covariance, mean if pivot is None else mean + pivot.double().repeat_interleave(kernel_size, 1)


def stem_max(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    B, V, _, T, H, W = x.shape
    C, kernel_size = weight.shape[1], weight.shape[3]
    out = weight.new_empty((B, V, T, (H // 2 + 1) // 2, (W // 2 + 1) // 2, C))
    code = torch.empty_like(out, dtype=torch.uint8)
    if out.numel() == 0:
        return out, code
    positions = out.shape[3] * out.shape[4]
    tile = choose_tile(stem_class("stem_max", x.dtype, C), B * V * T * positions, x.device)
    grid = (triton.cdiv(positions, tile["BLOCK_M"]) * triton.cdiv(C, tile["BLOCK_N"]) * B * V * T,)
    with torch.cuda.device_of(x):
        _stem_max_kernel[grid](
            x, weight.contiguous(), scale.contiguous(), shift.contiguous(), out, code, V, T, H, W, C, *x.stride(),
            KERNEL=kernel_size, **tile,
        )  # fmt: skip
    return out, code


def stem_products(x: Tensor, d: Tensor, y: Tensor, code: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    B, V, T, out_h, out_w, C = d.shape
    tile = choose_tile(stem_class("stem_products", x.dtype, C), B * V * T * out_h * out_w, x.device)
    tiles = B * T * triton.cdiv(out_h * out_w, tile["BLOCK_M"])
    partial = x.new_empty((triton.cdiv(tiles, tile["SHARE"]), V, C, 16), dtype=accumulator(x.dtype))
    grid = (partial.shape[0] * V * triton.cdiv(C, tile["BLOCK_N"]),)
    if partial.numel():
        with torch.cuda.device_of(x):
            _stem_products_kernel[grid](
                x, d, y, code, partial, B, V, T, *x.shape[-2:], C, *x.stride(), KERNEL=kernel_size, **tile
            )
    products = partial.sum(0, dtype=torch.float64)
    return products[..., : 3 * kernel_size].contiguous(), products[..., 15].contiguous()


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Every op for every model's stem."""
    dtype = PRECISIONS[precision]

    def clips(size, B, device):
        return randn(B, BRANCHES, 3, FRAMES, size, size, device=device, dtype=dtype)

    def moments_inputs(stem, B, device):
        return clips(stem[2], B, device), stem[1]

    def max_inputs(stem, B, device):
        C, k, size = stem
        weight = randn(BRANCHES, C, 3, k, device=device, dtype=dtype, fan_in=3 * k)
        return clips(size, B, device), weight, *(randn(BRANCHES, C, device=device) for _ in range(2))

    def products_inputs(stem, B, device):
        C, k, size = stem
        shape = (B, BRANCHES, FRAMES, size // 4, size // 4, C)
        code = torch.full(shape, 16, device=device, dtype=torch.uint8)  # the pixel at 4 * row, 4 * column
        d, y = (randn(*shape, device=device, dtype=dtype) for _ in range(2))
        return clips(size, B, device), d, y, code, k

    for stem in STEMS:
        name = f"{stem[0]} channels, k {stem[1]}"
        yield AuditCase(name, patch_covariance, plain.patch_covariance, partial(moments_inputs, stem))
        yield AuditCase(name, stem_max, plain.stem_max, partial(max_inputs, stem))
        yield AuditCase(name, stem_products, plain.stem_products, partial(products_inputs, stem))
