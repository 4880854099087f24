"""A linear layer on few rows with what surrounds it in a transformer: layer norm before, GELU and residual after."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_floating, check_same, check_shape, needs_gradient, register, select_impl

ACTIVATIONS = ("none", "gelu")


def norm_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition: product in x's dtype, the rest in float32 or wider; rounded after the norm and at the end."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if norm is not None:
        gamma, beta, eps = norm
        x = F.layer_norm(x.to(dtype), x.shape[-1:], gamma, beta, eps).to(x.dtype)
    out = F.linear(x, weight).to(dtype)
    if bias is not None:
        out = out + bias
    if activation == "gelu":
        out = F.gelu(out)
    if residual is not None:
        out = out + residual
    return out.to(x.dtype)


_fwd = register(
    "norm_linear",
    "norm_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps, bool gelu, Tensor? residual, "
    "str impl) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``activation(layer_norm(x) @ weight.T + bias) + residual`` in one launch, for a few hundred rows at most.

    So few rows leave the time to reading the weights: the kernel's tiles are small, to spread them over the GPU. The
    kernel is for inference, the reference is differentiable. Products accumulate in float32.

    Args:
        x: [..., K], float32, float16 or bfloat16 (the reference takes float64 too); its rows may lie apart in memory.
        weight: [N, K] of x's dtype, as nn.Linear has it.
        bias: [N], float32 (float64 for a float64 x); None is 0.
        norm: gamma [K], beta [K], like ``bias``, and eps of a layer norm over K, computed in float32 and rounded to
            x's dtype before the product; None leaves x as it is.
        activation: "none" or "gelu", the exact one.
        residual: [..., N] of x's dtype, added last; None is 0.
        impl: "auto" (Triton on CUDA where no gradient is recorded, else the reference), "reference" or "triton".

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: a rank, shape, device or ``activation`` is wrong, or K or N is 0.
        TypeError: a dtype is wrong, or ``norm`` is no triple.
        RuntimeError: the named implementation cannot run here or has no gradient.
    """
    check_linear(x, weight, bias, norm, residual)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    gamma, beta, eps = norm or (None, None, 0.0)
    unfit = "x must not be float64" if x.dtype == torch.float64 else ""
    impl = select_impl(impl, x, unfit=unfit or needs_gradient(x, weight, bias, gamma, beta, residual))
    if impl == "reference":
        return norm_linear_reference(x, weight, bias, norm, activation, residual)
    return _fwd(x, weight, bias, gamma, beta, eps, activation == "gelu", residual, impl)


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    residual: Tensor | None,
) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_floating(x=x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., K] with K at least 1, got {list(x.shape)}")
    K = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != K or weight.shape[0] < 1:
        raise ValueError(f"weight must be [N, K] = [N, {K}] with N at least 1 to fit x, got {list(weight.shape)}")
    if norm is not None and not (isinstance(norm, tuple) and len(norm) == 3 and isinstance(norm[2], float)):
        raise TypeError(f"norm must be (gamma, beta, eps) with a float eps, got {type(norm).__name__}")
    gamma, beta, _ = norm or (None, None, 0.0)
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, value, size, axes in (
        ("bias", bias, len(weight), "[N]"),
        ("gamma", gamma, K, "[K]"),
        ("beta", beta, K, "[K]"),
    ):
        if value is None:
            continue
        check_shape(name, value, (size,), axes)
        if value.dtype != wide:
            raise TypeError(f"{name} must be {wide} for x of {x.dtype}, got {value.dtype}")
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], len(weight)), "[..., N]")
    check_same("dtype", x, weight=weight, residual=residual)
    check_same("device", x, weight=weight, bias=bias, gamma=gamma, beta=beta, residual=residual)
