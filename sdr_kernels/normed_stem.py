"""FTCN's stem in training: temporal convolution, batch norm by the batch and both pools, no full-size result kept."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_floating, differentiable_once, needs_gradient, select_impl
from sdr_kernels._rows import patch_covariance, stem_max, stem_products
from sdr_kernels.batch_norm import (
    Batch,
    Gram,
    Norm,
    Normed,
    NormedConv,
    NormGradient,
    Statistics,
    batch_norm_reference,
    check_normed,
    in_dtype,
    process_group,
)
from sdr_kernels.temporal_conv3d import KERNEL_SIZES, conv3d_branches


def normed_stem_reference(
    x: Tensor, conv: NormedConv, bn: str = "batch", group: "dist.ProcessGroup | None" = None
) -> Normed:
    """The definition, layer by layer as an eager network runs it, each rounded to x's dtype."""
    z, statistics = batch_norm_reference(conv3d_branches(x, conv.weight.to(x.dtype)), conv, bn, group)
    pooled = F.max_pool3d(z.flatten(0, 1), (1, 2, 2)).relu()
    pooled = F.max_pool3d(pooled, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    return Normed(pooled.unflatten(0, z.shape[:2]), statistics)


def by_patch(weight: Tensor) -> Tensor:
    """[V, C, 3, k] as [V, 3k, C]: the product of a patch."""
    return weight.flatten(2).transpose(-1, -2)


class _NormedStem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, frozen, group, impl, *tensors):
        conv = NormedConv(*tensors, eps)
        weight = conv.weight.to(x.dtype)
        rows = x[:, 0, 0].numel()
        batch = None if frozen else Batch.of(rows, group)
        if batch is None:
            mean, var = conv.running_mean.double(), conv.running_var.double()
            kept = (None, None, None)
        else:
            gram = Gram.of(by_patch(weight), *patch_covariance(x, weight.shape[-1], impl), batch, rows)
            mean, var = gram.moments(batch)
            kept = gram.covariance, gram.local_mean, gram.mean
        norm = Norm.of(conv, mean, var, torch.promote_types(x.dtype, torch.float32))
        y, code = stem_max(x, weight, norm.scale, norm.shift, impl)
        ctx.save_for_backward(x, y, code, weight, *norm, *kept)
        ctx.options = batch, impl, [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        moments = mean.clone(), var.clone()  # the mean is kept too
        ctx.mark_non_differentiable(*moments)
        return y.movedim(-1, 2), *moments

    @staticmethod
    @differentiable_once
    def backward(ctx, dout, _mean, _var):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x, y, code, weight, *rest = ctx.saved_tensors
        norm, kept = Norm(*rest[:6]), rest[6:]
        batch, impl, dtypes = ctx.options
        products, dsums = stem_products(x, dout.movedim(2, -1).contiguous(), y, code, weight.shape[-1], impl)
        products = products.transpose(-1, -2)
        gram = Gram(by_patch(weight).double(), *kept, x[:, 0, 0].numel())
        if batch is not None:
            products = products - gram.mean[..., None] * dsums[:, None]  # as of patches less their mean
        gradient = NormGradient.of(norm, batch, gram.gradient_sums(norm, products, dsums))
        dweight = gram.dweight(gradient, batch, products, dsums).transpose(-1, -2).unflatten(-1, (3, -1))
        gradients = dweight, gradient.dgamma, gradient.dbeta, None, None
        return None, None, None, None, None, *(in_dtype(g, d) for g, d in zip(gradients, dtypes, strict=True))


def normed_stem(
    x: Tensor,
    conv: NormedConv,
    *,
    bn: str = "batch",
    group: "dist.ProcessGroup | None" = None,
    impl: str = "auto",
) -> Normed:
    """Convolve along time, batch norm, pool 2x2, ReLU, pool 3x3 at stride 2; differentiable once in the parameters.

    The statistics come from second moments of patches of 3 colours at k frames, so the convolution's result at the size
    of the image is never in memory; for the gradient it is kept which pixel each maximum was, a byte a value.

    Args:
        x: one clip for all branches, [B, 3, T, H, W], or a clip per branch, [B, V, 3, T, H, W]; H and W at least 2;
            float32, float16 or bfloat16 (the CPU's own and the reference take float64 too); any strides. Only the
            reference has a gradient for it, and ``auto`` takes it where one is asked for.
        conv: weight [V, C, 3, k], k in 1, 3, 5, and its batch norm.
        bn: as :func:`sdr_kernels.normed_bottleneck`'s, as are group and impl.

    Returns:
        ``out``, [B, V, C, T, (H // 2 + 1) // 2, (W // 2 + 1) // 2] of x's dtype; ``statistics`` of the convolution.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`sdr_kernels.normed_bottleneck`, or a gradient for x is asked of
            a kernel.
    """
    group = process_group(bn, group)
    check_normed_stem(x, conv, bn)
    if x.ndim == 5:
        x = x[:, None].expand(-1, len(conv.weight), -1, -1, -1, -1)
    no_tile = "x must not be float64" if x.dtype == torch.float64 else ""
    impl = select_impl(impl, x, has_cpu=True, unfit=needs_gradient(x) and "x asks for a gradient", no_tile=no_tile)
    if impl == "reference":
        return normed_stem_reference(x, conv, bn, group)
    out, mean, var = _NormedStem.apply(x, conv.eps, bn == "frozen", group, impl, *conv.tensors)
    rows = Batch.of(x[:, 0, 0].numel(), group).rows
    return Normed(out, [] if bn == "frozen" else [Statistics(mean, var, rows)])


def check_normed_stem(x: Tensor, conv: NormedConv, bn: str) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_floating(x=x)
    weight = conv.weight
    if weight.ndim != 4 or min(weight.shape) < 1 or weight.shape[2] != 3 or weight.shape[3] not in KERNEL_SIZES:
        raise ValueError(
            f"conv's weight must be [V, C, 3, k] with V and C at least 1 and k in 1, 3, 5, got {list(weight.shape)}"
        )
    if x.ndim not in (5, 6) or x.shape[-4] != 3 or x.shape[-3] < 1 or min(x.shape[-2:]) < 2:
        raise ValueError(
            "x must be [B, 3, T, H, W] or [B, V, 3, T, H, W] with T at least 1 and H and W at least 2, "
            f"got {list(x.shape)}"
        )
    if x.ndim == 6 and x.shape[1] != len(weight):
        raise ValueError(f"x must have a clip for each of weight's {len(weight)} branches, got {list(x.shape)}")
    check_normed("conv", conv, x, x.shape[0] * x.shape[-3:].numel(), bn)
