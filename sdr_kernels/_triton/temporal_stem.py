"""The stem as a maximum of products: batch norm folded in, a result is one maximum over 6x6 pixels at stride 4.

Scale, shift and ReLU are monotone once the scale's sign is in the weights, so they follow the maximum, once per result.
uint8 is multiplied as whole numbers around 0, exact in every dtype; normalisation is in the weights and in one constant
per channel, which is the same for all pixels of a window and so is added after the maximum.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, FRAMES, PRECISIONS, STEMS, AuditCase, randn
from sdr_kernels._ops import empty_channels_last
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels._triton.temporal_conv3d import relu
from sdr_kernels.temporal_stem import stem_shape, temporal_stem_reference

GREY = tl.constexpr(128)  # subtracted from uint8, so that sums of products stay small
UNIT = tl.constexpr(256)  # weights for uint8 are kept this much larger, or float16 would lose the small ones


@triton.jit
def of_colour(colour, red, green, blue):
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))


@triton.jit
def max_of_window(ptrs, tap_mask, row, column, last_row, last_column, stride_h, stride_w, w, MIDDLE: tl.constexpr):
    """Maximum of the convolution over 6x6 pixels from 2 above and left of (4 * row, 4 * column), [M, N].

    ptrs: [16], of the taps of pixel 0; row, column: [M] of the result; last_row, last_column: of the pixels that count;
    w: [16, N]; MIDDLE: subtracted from pixels.
    """
    top, left = row * 4 - 2, column * 4 - 2
    # a pixel outside counts as the edge's, which lies in the window: a maximum is none the wiser
    last_i = tl.minimum(last_row - top, 5).to(tl.int32)
    last_j = tl.minimum(last_column - left, 5).to(tl.int32)
    first_i = tl.minimum(tl.where(row == 0, 2, 0), last_i)
    first_j = tl.minimum(tl.where(column == 0, 2, 0), last_j)
    # pixels fastest, so that a warp reads neighbours
    ptrs = ptrs[:, None] + (top * stride_h + left * stride_w)[None, :]
    pixel = first_i.to(tl.int64) * stride_h + first_j.to(tl.int64) * stride_w
    x = tl.load(ptrs + pixel[None, :], mask=tap_mask[:, None], other=MIDDLE)
    best = tl.full((row.shape[0], w.shape[1]), float("-inf"), tl.float32)
    for step in range(1, 37):
        current = x if MIDDLE == 0 else (x.to(tl.int32) - MIDDLE).to(tl.float32).to(w.dtype)
        # the next pixel ahead of this one's product, which hides its latency; the last is read for nothing
        i = tl.minimum(tl.maximum(step // 6, first_i), last_i).to(tl.int64)
        j = tl.minimum(tl.maximum(step % 6, first_j), last_j).to(tl.int64)
        pixel = i * stride_h + j * stride_w
        x = tl.load(ptrs + pixel[None, :], mask=tap_mask[:, None], other=MIDDLE)
        product = tl.dot(tl.trans(current), w, input_precision="ieee")
        best = tl.maximum(best, product, propagate_nan=tl.PropagateNan.ALL)
    return best


STRIDES = ["stride_b", "stride_v", "stride_c", "stride_t", "stride_h", "stride_w"]


@triton.jit(do_not_specialize=["num_groups", "num_branches", "T", "H", "W", *STRIDES])
def _temporal_stem_fwd_kernel(
    x_ptr,  # [B, num_groups, 3, T, H, W] by its strides
    w_ptr,  # [num_groups, num_branches, C, 3, KERNEL]
    scale_ptr, shift_ptr,  # [num_groups, num_branches, C] float32
    out_ptr,  # [B, num_groups, num_branches, T, positions, C]
    num_groups, num_branches, T, H, W,
    stride_b, stride_v, stride_c, stride_t, stride_h, stride_w,
    factor_r, factor_g, factor_b,  # of a colour's weights
    offset_r, offset_g, offset_b,  # of its pixels
    C: tl.constexpr, KERNEL: tl.constexpr, UINT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    out_w = (W // 2 + 1) // 2
    positions = ((H // 2 + 1) // 2).to(tl.int64) * out_w
    column_tiles = tl.cdiv(num_branches * C, BLOCK_N)
    tiles = tl.cdiv(positions, BLOCK_M) * column_tiles
    frame = tl.program_id(0).to(tl.int64) // tiles  # of B * num_groups * T
    clip, t = frame // T, frame % T
    group = clip % num_groups
    tile = tl.program_id(0) % tiles
    position = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    column_mask = columns < num_branches * C
    group_columns = group * num_branches * C + columns
    k = tl.arange(0, 16)  # colour and tap, in weight's order
    colour, tap_t = k // KERNEL, t + k % KERNEL - KERNEL // 2
    tap_mask = (k < 3 * KERNEL) & (tap_t >= 0) & (tap_t < T)
    scale_ptr += group_columns
    scale = tl.load(scale_ptr, mask=column_mask, other=0.0)
    sign = (scale > 0).to(tl.float32) - (scale < 0).to(tl.float32)
    w_mask = tap_mask[:, None] & column_mask[None, :]
    w = tl.load(w_ptr + (group_columns[None, :] * (3 * KERNEL) + k[:, None]), mask=w_mask, other=0.0)
    w = w.to(tl.float32) * sign[None, :]
    if UINT8:
        w *= of_colour(colour, factor_r, factor_g, factor_b)[:, None]
    w = w.to(w_ptr.dtype.element_ty)
    if UINT8:
        # from the rounded weights: their error then multiplies the normalised pixel, which is smaller
        constant = w.to(tl.float32) * of_colour(colour, offset_r, offset_g, offset_b)[:, None]
        constant = tl.sum(tl.where(w_mask, constant, 0.0), 0)
    best = max_of_window(
        x_ptr + (clip // num_groups * stride_b + group * stride_v + colour * stride_c.to(tl.int64) + tap_t * stride_t),
        tap_mask, position // out_w, position % out_w, (H // 2).to(tl.int64) * 2 - 1, (W // 2).to(tl.int64) * 2 - 1,
        stride_h, stride_w, w, GREY if UINT8 else 0,
    )  # fmt: skip
    scale = tl.abs(tl.load(scale_ptr, mask=column_mask, other=0.0))
    if UINT8:
        best += constant[None, :]
        scale /= UNIT
    shift = tl.load(shift_ptr + group_columns, mask=column_mask, other=0.0)
    best = relu(best * scale[None, :] + shift[None, :])
    frames = (clip * num_branches + columns // C) * T + t
    offsets = (frames * positions * C + columns % C)[None, :] + (position * C)[:, None]
    mask = (position < positions)[:, None] & column_mask[None, :]
    tl.store(out_ptr + offsets, best.to(out_ptr.dtype.element_ty), mask=mask)


def stem_class(dtype: torch.dtype, columns: int) -> str:
    return f"temporal_stem {precision_class(dtype)} out{min(width_class(columns), 128)}"


def temporal_stem_fwd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    out = empty_channels_last(weight, stem_shape(x, weight))
    B, V, C, T, H, W = out.shape
    if B == 0:
        return out
    # one clip for all branches: their channels are columns of one product
    x, groups = (x[:, None], 1) if x.ndim == 5 else (x, V)
    columns = V // groups * C
    tile = choose_tile(stem_class(weight.dtype, columns), B * V * T * H * W, x.device)
    grid = (triton.cdiv(H * W, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]) * B * groups * T,)
    # (u / 255 - mean) / std = factor * (u - GREY + offset) / UNIT
    factors = [UNIT.value / (255 * value) for value in std or (1, 1, 1)]
    offsets = [GREY.value - 255 * value for value in mean or (0, 0, 0)]
    with torch.cuda.device_of(x):
        _temporal_stem_fwd_kernel[grid](
            x, weight.contiguous(), scale.contiguous(), shift.contiguous(), out, groups, V // groups, T, *x.shape[-2:],
            *x.stride(), *factors, *offsets, C=C, KERNEL=weight.shape[3], UINT8=x.dtype == torch.uint8, **tile,
        )  # fmt: skip
    return out


def stem_reference(x, weight, scale, shift, mean, std) -> Tensor:
    return temporal_stem_reference(x, weight, scale, shift, None if mean is None else (mean, std))


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Every model's stem, from uint8 and from weight's dtype, one clip for all branches and a clip per branch."""
    dtype = PRECISIONS[precision]

    def inputs(stem, uint8, per_branch, B, device):
        C, k, size = stem
        shape = (B, BRANCHES, 3, FRAMES, size, size) if per_branch else (B, 3, FRAMES, size, size)
        if uint8:
            x = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        else:
            x = randn(*shape, device=device, dtype=dtype)
        weight = randn(BRANCHES, C, 3, k, device=device, dtype=dtype, fan_in=3 * k)
        affine = [randn(BRANCHES, C, device=device) for _ in range(2)]
        return x, weight, *affine, *([[0.5] * 3, [0.25] * 3] if uint8 else [None, None])

    for stem in STEMS:
        for per_branch in (False, True):
            for uint8 in (False, True):
                clips = "a clip per branch" if per_branch else "one clip"
                name = f"{stem[0]} channels of {'uint8' if uint8 else 'floating'}, {clips}"
                yield AuditCase(name, temporal_stem_fwd, stem_reference, partial(inputs, stem, uint8, per_branch))
