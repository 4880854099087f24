"""FTCN's stem for V branches: temporal convolution, folded batch norm and both pools in one pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import (
    check_floating,
    check_same,
    check_shape,
    empty_channels_last,
    needs_gradient,
    register,
    select_impl,
)
from sdr_kernels.temporal_conv3d import KERNEL_SIZES, affine, conv3d_branches

Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each colour, in 0..1


def temporal_stem_reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, normalise: Normalisation | None = None
) -> Tensor:
    """The definition: convolution in weight's dtype, the rest in float32 or wider, rounded once."""
    if normalise is not None:
        wide = x.to(torch.promote_types(weight.dtype, torch.float32))
        colours = zip(wide.unbind(-4), *normalise, strict=True)
        x = torch.stack([(colour / 255 - mean) / std for colour, mean, std in colours], dim=-4).to(weight.dtype)
    if x.ndim == 5:
        x = x[:, None].expand(-1, len(weight), -1, -1, -1, -1)
    out = affine(conv3d_branches(x, weight), scale, shift)
    # batch norm before the pool: max commutes with it only where the scale is not negative
    pooled = F.max_pool3d(out.flatten(0, 1), (1, 2, 2)).relu()
    pooled = F.max_pool3d(pooled, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    return pooled.unflatten(0, out.shape[:2]).to(weight.dtype)


def stem_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The result's: 2x2 pooled, then 3x3 at stride 2 with a border of one."""
    V, C = weight.shape[:2]
    T, H, W = x.shape[-3:]
    return x.shape[0], V, C, T, (H // 2 + 1) // 2, (W // 2 + 1) // 2


_fwd = register(
    "temporal_stem",
    "temporal_stem_fwd",
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, float[]? mean, float[]? std, str impl) -> Tensor",
    fake=lambda x, weight, scale, shift, mean, std: empty_channels_last(weight, stem_shape(x, weight)),
)


def temporal_stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    normalise: Normalisation | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolve along time, scale and shift, pool 2x2, clip below 0, pool 3x3 at stride 2: FTCN's stem in inference.

    The convolution's full-resolution result is never in memory where a kernel runs, and normalising uint8 costs nothing
    there. Only the reference is differentiable, and ``auto`` takes it where a gradient is asked for.

    Args:
        x: one clip for all branches, [B, 3, T, H, W], or a clip per branch, [B, V, 3, T, H, W]; H and W at least 2;
            uint8, or of weight's dtype; any strides.
        weight: [V, C, 3, k], float32, float16 or bfloat16 (the reference takes float64 too), k in 1, 3, 5; time is
            zero-padded by k // 2, after normalisation.
        scale: [V, C], float32 (float64 for a float64 weight), of either sign.
        shift: [V, C], like ``scale``.
        normalise: mean and standard deviation of each colour, in 0..1, for uint8 only, which needs them:
            (x / 255 - mean) / std is convolved.
        impl: "auto" (Triton on CUDA, the CPU's own on a CPU, else the reference), "reference", "cpu" or "triton".

    Returns:
        [B, V, C, T, (H // 2 + 1) // 2, (W // 2 + 1) // 2] of weight's dtype, channels innermost in memory where a
        kernel ran.

    Raises:
        ValueError: a rank, shape, device, kernel size or normalisation is wrong, or T, V or C is 0.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here, or a gradient is asked of it and it has none.
    """
    check_stem(x, weight, scale, shift, normalise)
    unfit = "weight must not be float64" if weight.dtype == torch.float64 else needs_gradient(x, weight, scale, shift)
    impl = select_impl(impl, x, has_cpu=True, unfit=unfit)
    if impl == "reference":
        return temporal_stem_reference(x, weight, scale, shift, normalise)
    mean, std = normalise or (None, None)
    return _fwd(x, weight, scale, shift, mean, std, impl)


def check_stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, normalise: Normalisation | None) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    if weight.ndim != 4 or min(weight.shape) < 1 or weight.shape[2] != 3 or weight.shape[3] not in KERNEL_SIZES:
        raise ValueError(
            f"weight must be [V, C, 3, k] with V and C at least 1 and k in 1, 3, 5, got {list(weight.shape)}"
        )
    V, C = weight.shape[:2]
    if x.ndim not in (5, 6) or x.shape[-4] != 3 or x.shape[-3] < 1 or min(x.shape[-2:]) < 2:
        raise ValueError(
            "x must be [B, 3, T, H, W] or [B, V, 3, T, H, W] with T at least 1 and H and W at least 2, "
            f"got {list(x.shape)}"
        )
    if x.ndim == 6 and x.shape[1] != V:
        raise ValueError(f"x must have a clip for each of weight's {V} branches, got {list(x.shape)}")
    check_floating(weight=weight)
    check_normalise(x, weight, normalise)
    expected = torch.promote_types(weight.dtype, torch.float32)
    for name, value in (("scale", scale), ("shift", shift)):
        check_shape(name, value, (V, C), "[V, C]")
        if value.dtype != expected:
            raise TypeError(f"{name} must be {expected} for weight of {weight.dtype}, got {value.dtype}")
    check_same("device", x, weight=weight, scale=scale, shift=shift)


def check_normalise(x: Tensor, weight: Tensor, normalise: Normalisation | None) -> None:
    """Raise unless x is uint8 and comes with three means and deviations, or has weight's dtype and comes with none."""
    if x.dtype not in (torch.uint8, weight.dtype):
        raise TypeError(f"x must be uint8 or of weight's dtype, {weight.dtype}, got {x.dtype}")
    if (normalise is not None) != (x.dtype == torch.uint8):
        raise ValueError(f"normalise must be given for uint8 and only for it, got {normalise} for x of {x.dtype}")
    if normalise is not None and (
        len(normalise) != 2 or any(len(values) != 3 for values in normalise) or not min(normalise[1]) > 0
    ):
        raise ValueError(f"normalise must be three means and three standard deviations above 0, got {normalise}")
