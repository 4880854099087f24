"""Mean over positions: a program sums one frame's positions for a block of channels, neighbours in memory."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BRANCHES, FRAMES, PRECISIONS, AuditCase, randn
from sdr_kernels._ops import channels_last
from sdr_kernels._tiles import choose_tile, precision_class
from sdr_kernels._triton.temporal_conv3d import rows_of
from sdr_kernels.spatial_mean import empty_tokens, spatial_mean_reference


@triton.jit(do_not_specialize=["V", "T", "positions"])
def _spatial_mean_fwd_kernel(
    x_ptr,  # [B, V, T, positions, C]
    out_ptr,  # [B, T, V, C]
    V, T, positions,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    frame = (tl.program_id(0) // channel_tiles).to(tl.int64)  # of B * V * T
    channels = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    channel_mask = channels < C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, positions, BLOCK_M):
        position = start + tl.arange(0, BLOCK_M).to(tl.int64)
        offsets = (frame * positions + position)[:, None] * C + channels[None, :]
        mask = (position < positions)[:, None] & channel_mask[None, :]
        acc += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / positions
    clip, branch, time = frame // (V * T), frame // T % V, frame % T
    row = (clip * T + time) * V + branch
    tl.store(out_ptr + row * C + channels, mean.to(out_ptr.dtype.element_ty), mask=channel_mask)


def spatial_mean_fwd(x: Tensor) -> Tensor:
    B, V, C, T, H, W = x.shape
    out = empty_tokens(x)
    if B == 0:
        return out
    tile = choose_tile(f"spatial_mean {precision_class(x.dtype)}", B * V * T * H * W, x.device)
    grid = (B * V * T * triton.cdiv(C, tile["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        _spatial_mean_fwd_kernel[grid](rows_of(x), out, V, T, H * W, C=C, **tile)
    return out


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """The last features of the shipped models."""

    def inputs(C, H, B, device):
        x = randn(B, BRANCHES, C, FRAMES // 2, H, H, device=device, dtype=PRECISIONS[precision])
        return (channels_last(x),)

    for C, H in ((2048, 7), (1024, 14), (64, 8)):
        reference = spatial_mean_reference
        yield AuditCase(f"{C} channels", spatial_mean_fwd, reference, partial(inputs, C, H), matrix=False)
