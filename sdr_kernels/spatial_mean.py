"""Mean over the positions of every frame: a backbone's last features to one token per branch and time step."""

import torch
from torch import Tensor

from sdr_kernels._ops import needs_gradient, register, select_impl
from sdr_kernels.temporal_conv3d import check_clips


def spatial_mean_reference(x: Tensor) -> Tensor:
    """The definition: summed in float32 or wider, rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # moved first, so that the result has x's order of memory where channels are innermost: on a CPU 40 times faster
    # there, and up to twice as slow where they are not
    return x.movedim(-4, -1).mean((-3, -2), dtype=dtype).to(x.dtype)


def empty_tokens(x: Tensor) -> Tensor:
    """An unwritten [B, V, T, C] whose memory is [B, T, V, C]: a time step's branches side by side are then a view."""
    B, V, C, T = x.shape[:4]
    return x.new_empty((B, T, V, C)).transpose(1, 2)


_fwd = register("spatial_mean", "spatial_mean_fwd", "(Tensor x, str impl) -> Tensor", fake=empty_tokens)


def spatial_mean(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Average every frame's positions; the kernel is for inference, the reference is differentiable.

    Args:
        x: [B, V, C, T, H, W], float32, float16 or bfloat16 (the reference takes float64 too); fastest where channels
            are innermost in memory.
        impl: "auto" (Triton on CUDA where no gradient is recorded, else the reference), "reference" or "triton".

    Returns:
        [B, V, T, C] of x's dtype, summed in float32. Where a kernel ran, memory is [B, T, V, C], so that
        ``out.transpose(1, 2).flatten(2)``, a time step's branches side by side, copies nothing.

    Raises:
        ValueError: the rank is wrong, or an axis other than B is 0.
        TypeError: the dtype is wrong.
        RuntimeError: the named implementation cannot run here or has no gradient.
    """
    check_clips(x)
    unfit = "x must not be float64" if x.dtype == torch.float64 else needs_gradient(x)
    impl = select_impl(impl, x, unfit=unfit)
    if impl == "reference":
        return spatial_mean_reference(x)
    return _fwd(x, impl)
