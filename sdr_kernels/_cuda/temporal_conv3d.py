"""Temporal convolution by tensor cores: launcher of ``csrc/temporal_conv3d.cu``."""

import torch
from torch import Tensor

from sdr_kernels._cuda.loader import launch
from sdr_kernels._ops import channels_last, empty_channels_last

BLOCK_M, BLOCK_K, STAGES, THREADS, PAD = 128, 32, 3, 256, 8  # as in csrc/temporal_conv3d.cu


def why_unfit(x: Tensor) -> str:
    """Why this kernel does not take ``x``; empty where it does."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x must be float16 or bfloat16, which tensor cores multiply exactly, got {x.dtype}"
    return ""


def shared_bytes(block_n: int) -> int:
    """Of a block: its stages of x and weight, and after them, in the same place, its float32 sums."""
    stage = 2 * (BLOCK_M * (BLOCK_K + PAD) + BLOCK_K * (block_n + PAD))
    return max(STAGES * stage, 4 * BLOCK_M * (block_n + PAD))


def rows_of(x: Tensor) -> Tensor:
    """[B, V, C, T, H, W] as contiguous [B, V, T, H, W, C]; free where channels are innermost already."""
    return channels_last(x).movedim(-4, -1)


def temporal_conv3d_fwd(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    B, V, C_in, T, H, W = x.shape
    C_out, kernel = weight.shape[1], weight.shape[3]
    out = empty_channels_last(x, (B, V, C_out, T, H, W))
    block_n = 64 if C_out <= 64 else 128
    tiles = B * V * -(-T * H * W // BLOCK_M) * -(-C_out // block_n)
    launch(
        f"temporal_conv3d_{str(x.dtype).removeprefix('torch.')}_n{block_n}", x, (tiles,), (THREADS,),
        [
            rows_of(x), weight.permute(0, 3, 2, 1).contiguous(),  # [V, k, C_in, C_out]
            None if scale is None else scale.contiguous(), None if shift is None else shift.contiguous(),
            None if residual is None else rows_of(residual), out,
            V, T * H * W, H * W, C_in, C_out, kernel, int(relu),
        ],
        shared_bytes(block_n),
    )  # fmt: skip
    return out


def temporal_conv3d_dweight(x: Tensor, dout: Tensor, kernel_size: int) -> Tensor:
    """Triton's: the gradient of the weight has no CUDA kernel."""
    from sdr_kernels._triton import temporal_conv3d

    return temporal_conv3d.temporal_conv3d_dweight(x, dout, kernel_size)
