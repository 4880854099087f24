"""Temporal convolution of V branches: kernels of k x 1 x 1, every branch with its own weights, in one launch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._cuda.temporal_conv3d import why_unfit
from sdr_kernels._ops import (
    check_floating,
    check_same,
    check_shape,
    differentiable_once,
    empty_channels_last,
    needs_gradient,
    register,
    select_impl,
    why_not,
)

KERNEL_SIZES = (1, 3, 5)


def conv3d_branches(x: Tensor, weight: Tensor) -> Tensor:
    """x: [B, V, C_in, T, H, W] and weight: [V, C_out, C_in, k] to [B, V, C_out, T, H, W], zero-padded to keep T."""
    padding = (weight.shape[-1] // 2, 0, 0)
    return torch.stack([F.conv3d(x[:, v], w[..., None, None], padding=padding) for v, w in enumerate(weight)], dim=1)


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift of each channel, in float32 or wider; x: [B, V, C, T, H, W]; scale, shift: [V, C]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        x = x * scale[..., None, None, None]
    return x if shift is None else x + shift[..., None, None, None]


def temporal_conv3d_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The definition: convolution in x's dtype, the rest in float32 or wider, rounded once."""
    out = affine(conv3d_branches(x, weight), scale, shift)
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).to(x.dtype)


def _fake_fwd(x, weight, scale, shift, residual, relu):
    B, V, _, T, H, W = x.shape
    return empty_channels_last(x, (B, V, weight.shape[1], T, H, W))


_fwd = register(
    "temporal_conv3d",
    "temporal_conv3d_fwd",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, bool relu, str impl) -> Tensor",
    fake=_fake_fwd,
)
_dweight = register(
    "temporal_conv3d",
    "temporal_conv3d_dweight",
    "(Tensor x, Tensor dout, int kernel_size, str impl) -> Tensor",
    fake=lambda x, dout, kernel_size: x.new_empty(
        (x.shape[1], kernel_size, x.shape[2], dout.shape[2]), dtype=torch.float32
    ).permute(0, 3, 2, 1),
)


class _TemporalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, shift, residual, relu, impl):
        out = _fwd(x, weight, scale, shift, residual, relu, impl)
        ctx.save_for_backward(x, weight, scale, out if relu else None)
        ctx.impl = impl
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        x, weight, scale, out = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dz = dout if out is None else torch.ops.aten.threshold_backward(dout, out, 0)  # NaN and Inf as ReLU's own
        dx = dweight = dscale = dshift = None
        if needs[0]:
            # a convolution with the taps reversed and the channels exchanged
            dconv = dz if scale is None else (dz * scale[..., None, None, None]).to(dz.dtype)
            dx = _fwd(dconv, weight.transpose(1, 2).flip(-1), None, None, None, False, ctx.impl)
        if needs[1] or needs[2]:
            dw = _dweight(x, dz, weight.shape[-1], ctx.impl)  # of the convolution without its scale, float32
            # sum over rows of dz * conv(x, w) is the inner product of w with its own gradient
            dscale = (dw * weight).sum((-2, -1)) if needs[2] else None
            dweight = (dw if scale is None else dw * scale[..., None, None]).to(weight.dtype)
        if needs[3]:
            dshift = dz.sum((0, 3, 4, 5), dtype=torch.float32)
        return dx, dweight if needs[1] else None, dscale, dshift, dz if needs[4] else None, None, None


def temporal_conv3d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Convolve every branch along time, then scale, shift, add and clip; differentiable in every tensor.

    ``relu(conv(x, weight) * scale + shift + residual)``: with a batch norm folded into scale and shift it is any layer
    of FTCN (ICCV 2021). Products accumulate in float32; fastest where channels are innermost in memory.

    Args:
        x: [B, V, C_in, T, H, W], float32, float16 or bfloat16 (the reference takes float64 too).
        weight: [V, C_out, C_in, k] of x's dtype, k in 1, 3, 5; time is zero-padded by k // 2.
        scale: [V, C_out], float32 (float64 for a float64 x); None is 1.
        shift: [V, C_out], like ``scale``; None is 0.
        residual: [B, V, C_out, T, H, W] of x's dtype; None is 0.
        relu: clip below 0 at the end.
        impl: "auto" (Triton on CUDA, else CUDA C++, else the reference), "reference", "triton", or "cuda", which takes
            float16 and bfloat16.

    Returns:
        [B, V, C_out, T, H, W] of x's dtype, channels innermost in memory where a kernel ran.

    Raises:
        ValueError: a rank, shape, device or kernel size is wrong, or T, H, W or a channel count is 0.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here.
    """
    check_conv(x, weight, scale, shift, residual)
    unfit = "x must not be float64" if x.dtype == torch.float64 else ""
    impl = select_impl(
        impl, x, op="temporal_conv3d", unfit=unfit, no_cuda=why_unfit(x) or _why_no_dweight(weight, scale)
    )
    if impl == "reference":
        return temporal_conv3d_reference(x, weight, scale, shift, residual, relu)
    return _TemporalConv3d.apply(x, weight, scale, shift, residual, relu, impl)


def _why_no_dweight(weight: Tensor, scale: Tensor | None) -> str:
    """Why the CUDA kernel's backward cannot run: the gradients of weight and scale are Triton's there too."""
    problem = why_not("triton", weight.device) if needs_gradient(weight, scale) else ""
    return f"weight's gradient is Triton's: {problem}" if problem else ""


def check_conv(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_clips(x)
    V, C_in = x.shape[1:3]
    check_weight("weight", weight, x, C_in)
    C_out = weight.shape[1]
    check_affine("scale", scale, x, (V, C_out))
    check_affine("shift", shift, x, (V, C_out))
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], V, C_out, *x.shape[3:]), "[B, V, C_out, T, H, W]")
    check_same("dtype", x, weight=weight, residual=residual)
    check_same("device", x, weight=weight, scale=scale, shift=shift, residual=residual)


def check_clips(x: Tensor) -> None:
    """Raise unless x is a floating [B, V, C, T, H, W] in which only B may be 0."""
    check_floating(x=x)
    if x.ndim != 6 or min(x.shape[1:]) < 1:
        raise ValueError(f"x must be [B, V, C, T, H, W] with all but B at least 1, got {list(x.shape)}")


def check_weight(name: str, weight: Tensor, x: Tensor, C_in: int, C_out: int | None = None) -> None:
    """Raise unless weight is [V, C_out, C_in, k] for the branches of x and a kernel size that there is."""
    V, k = x.shape[1], weight.shape[-1] if weight.ndim else 0
    if (
        weight.ndim != 4
        or weight.shape[0] != V
        or weight.shape[2] != C_in
        or weight.shape[1] != (C_out or weight.shape[1])
    ):
        expected = f"[{V}, {C_out or 'C_out'}, {C_in}, k]"
        raise ValueError(f"{name} must be [V, C_out, C_in, k] = {expected} to fit x, got {list(weight.shape)}")
    if weight.shape[1] < 1 or k not in KERNEL_SIZES:
        raise ValueError(f"{name} must have C_out of at least 1 and k in 1, 3, 5, got {list(weight.shape)}")


def check_affine(name: str, value: Tensor | None, x: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a scale or shift is absent or [V, C] in float32, or in float64 for a float64 x."""
    if value is None:
        return
    check_shape(name, value, shape, "[V, C_out]")
    expected = torch.promote_types(x.dtype, torch.float32)
    if value.dtype != expected:
        raise TypeError(f"{name} must be {expected} for x of {x.dtype}, got {value.dtype}")
