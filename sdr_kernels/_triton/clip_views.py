"""V views of uint8 clips: a program computes a tile of one frame of one view, all three colours of each pixel.

A clip is read once and written V times, so memory bounds the work from below: views of a frame are neighbours among
the programs, and all but the first find the frame in L2. What is counted above that bound is instructions, so a tile is
rows by columns: no pixel needs a division, and what depends on a row or a column alone is computed once for it. Where a
view samples whole pixels (no crop) one is read, not four. Neighbours of a warp are neighbours in a row, so that its
reads and its three stores, one a colour, cover whole lines of L2 between them. One store of joined colours would cross
shared memory, for a fifth more instructions (counted in sm_90's code, not timed).
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, FRAMES, PRECISIONS, AuditCase, randn
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels.clip_views import MAX_SIDE as MAX
from sdr_kernels.clip_views import clip_views_reference, empty_views

MAX_SIDE = tl.constexpr(MAX)


@triton.jit
def is_whole(x):
    return x - tl.floor(x) == 0  # not where it is NaN or infinite


@triton.jit
def taps(scale, offset, index, size, stride):
    """Offsets of the two source pixels that output pixels lie between, and the second's weight.

    Pixels are counted in float32, which is exact for sides that the public function lets pass; for any scale and
    offset both lie in 0..size - 1.
    """
    last = size - 1.0
    nothing = (scale - scale) + (offset - offset)  # 0; NaN where one is not finite, which the weight takes on
    scale, offset = tl.where(nothing == 0, scale, 0.0), tl.where(nothing == 0, offset, 0.0)
    position = tl.clamp(scale * index.to(tl.float32) + offset, 0.0, last)
    first = tl.floor(position)
    second = tl.minimum(first + 1.0, last)
    weight = position - first + nothing
    return first.to(tl.int32).to(tl.int64) * stride, second.to(tl.int32).to(tl.int64) * stride, weight


@triton.jit
def load_pixels(ptrs):
    # taps lie in the frame for every row and column, those of a tile that lie beyond it too: nothing is to be masked
    return tl.load(ptrs).to(tl.float32)


@triton.jit
def bilinear(ptr, top, bottom, left, right, down, across):
    """ptr: of one colour's frame; top, bottom: offsets of rows, [M]; left, right: of columns, [N]; weights [M], [N]."""
    top, bottom, left, right = top[:, None], bottom[:, None], left[None, :], right[None, :]
    x00, x01 = load_pixels(ptr + (top + left)), load_pixels(ptr + (top + right))
    x10, x11 = load_pixels(ptr + (bottom + left)), load_pixels(ptr + (bottom + right))
    upper = x00 + across[None, :] * (x01 - x00)
    lower = x10 + across[None, :] * (x11 - x10)
    return upper + down[:, None] * (lower - upper)


@triton.jit
def mapped(red, green, blue, color_ptr, gain, shift):
    """One colour of the result from three in 0..255: its row of the colour map, clamped, normalised."""
    of_red, of_green, of_blue = tl.load(color_ptr) / 255, tl.load(color_ptr + 1) / 255, tl.load(color_ptr + 2) / 255
    x = of_red * red + of_green * green + of_blue * blue + tl.load(color_ptr + 3)
    return tl.clamp(x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL) * gain + shift


STRIDES = ["stride_b", "stride_t", "stride_h", "stride_w", "stride_row"]


@triton.jit(do_not_specialize=["V", "F", "T", "H", "W", *STRIDES])
def _clip_views_fwd_kernel(
    clips_ptr,  # uint8, [B, 3, T, H, W] by its strides
    sampling_ptr,  # float32, [B, V, F, 4]
    color_ptr,  # float32, [B, V, F, 3, 4]
    hole_ptr,  # int32, [B, V, F, 4]
    out_ptr,  # [B, V, T, H, W, 3]
    V, F, T, H, W,
    stride_b, stride_c, stride_t, stride_h, stride_w, stride_row,
    gain_r, gain_g, gain_b, shift_r, shift_g, shift_b, fill_r, fill_g, fill_b,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles = tl.cdiv(H, BLOCK_H) * tiles_w
    tile, frame = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # frame: of B * T * V
    v, t, b = (frame % V).to(tl.int64), (frame // V % T).to(tl.int64), (frame // V // T).to(tl.int64)
    view = (b * V + v) * F + (frame // V % T % F)  # of the maps
    # the bounds only say that 32 bits are enough
    tile_y, tile_x = tl.maximum(tl.minimum(tile // tiles_w, MAX_SIDE // BLOCK_H), 0), tile % tiles_w
    row = tile_y * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.minimum(tile_x, MAX_SIDE // BLOCK_W) * BLOCK_W + tl.arange(0, BLOCK_W)

    sampling_ptr += view * 4
    scale_x, offset_x = tl.load(sampling_ptr), tl.load(sampling_ptr + 1)
    scale_y, offset_y = tl.load(sampling_ptr + 2), tl.load(sampling_ptr + 3)
    left, right, across = taps(scale_x, offset_x, column, W, stride_w)
    top, bottom, down = taps(scale_y, offset_y, row, H, stride_h)
    red_ptr = clips_ptr + (b * stride_b + t * stride_t)
    green_ptr = red_ptr + tl.cast(stride_c, tl.int64)
    blue_ptr = green_ptr + tl.cast(stride_c, tl.int64)
    if is_whole(scale_x) & is_whole(offset_x) & is_whole(scale_y) & is_whole(offset_y):
        offsets = top[:, None] + left[None, :]
        red = load_pixels(red_ptr + offsets)
        green = load_pixels(green_ptr + offsets)
        blue = load_pixels(blue_ptr + offsets)
    else:
        red = bilinear(red_ptr, top, bottom, left, right, down, across)
        green = bilinear(green_ptr, top, bottom, left, right, down, across)
        blue = bilinear(blue_ptr, top, bottom, left, right, down, across)

    color_ptr += view * 12
    out_r = mapped(red, green, blue, color_ptr, gain_r, shift_r)
    out_g = mapped(red, green, blue, color_ptr + 4, gain_g, shift_g)
    out_b = mapped(red, green, blue, color_ptr + 8, gain_b, shift_b)
    hole_ptr += view * 4
    inside_x = (column >= tl.load(hole_ptr)) & (column < tl.load(hole_ptr + 1))
    inside_y = (row >= tl.load(hole_ptr + 2)) & (row < tl.load(hole_ptr + 3))
    inside = inside_y[:, None] & inside_x[None, :]

    out_ptr += ((b * V + v) * T + t) * H * stride_row
    pixels = out_ptr + ((row.to(tl.int64) * stride_row)[:, None] + (column.to(tl.int64) * 3)[None, :])
    mask = (row < H)[:, None] & (column < W)[None, :]
    tl.store(pixels, tl.where(inside, fill_r, out_r).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(pixels + 1, tl.where(inside, fill_g, out_g).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(pixels + 2, tl.where(inside, fill_b, out_b).to(out_ptr.dtype.element_ty), mask=mask)


def clip_views_fwd(
    clips: Tensor,
    sampling: Tensor,
    color: Tensor,
    hole: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    black: bool,
    dtype: torch.dtype,
) -> Tensor:
    B, _, T, H, W = clips.shape
    V, F = sampling.shape[1:3]
    out = empty_views(clips, sampling, dtype)
    if B == 0:
        return out
    tile = choose_tile(f"clip_views {precision_class(dtype)}", B * V * T * H * W, clips.device)
    gain = [1 / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    fill = shift if black else [0.0] * 3
    grid = (B * T * V * triton.cdiv(H, tile["BLOCK_H"]) * triton.cdiv(W, tile["BLOCK_W"]),)
    with torch.cuda.device_of(clips):
        _clip_views_fwd_kernel[grid](
            clips, sampling.contiguous(), color.contiguous(), hole.contiguous(), out, V, F, T, H, W,
            *clips.stride(), 3 * W, *gain, *shift, *fill, **tile,
        )  # fmt: skip
    return out


def views_reference(clips, sampling, color, hole, mean, std, black, dtype) -> Tensor:
    """The reference of the launcher's arguments; in float64 for maps in float64."""
    dtype = torch.promote_types(dtype, sampling.dtype) if sampling.dtype == torch.float64 else dtype
    return clip_views_reference(clips, sampling, color, hole, mean, std, "black" if black else "mean", dtype)


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Clips as frames are decoded, colours innermost: whole pixels in three views, a crop in the fourth."""

    def inputs(size, B, device):
        clips = torch.randint(0, 256, (B, FRAMES, size, size, 3), device=device, dtype=torch.uint8).movedim(-1, 1)
        sampling = torch.zeros(B, BRANCHES, 1, 4, device=device)
        sampling[..., ::2] = 1
        sampling[:, -1, :, ::2] = 0.9
        color = randn(B, BRANCHES, 1, 3, 4, device=device, fan_in=3)
        hole = torch.zeros(B, BRANCHES, 1, 4, device=device, dtype=torch.int32)
        hole[:, 1] = size // 2
        return clips, sampling, color, hole, [0.5] * 3, [0.25] * 3, False, PRECISIONS[precision]

    for size in (224, 64):
        yield AuditCase(f"{size} x {size}", clip_views_fwd, views_reference, partial(inputs, size), matrix=False)
