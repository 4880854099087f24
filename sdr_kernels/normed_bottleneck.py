"""Bottleneck of a temporal-only ResNet in training: convolutions, batch norms by the batch, shortcut and pools."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import differentiable_once, select_impl
from sdr_kernels._schemes import SCHEMES, Kept, Plan
from sdr_kernels.batch_norm import (
    Batch,
    Normed,
    NormedConv,
    Statistics,
    batch_norm_reference,
    check_normed,
    in_dtype,
    process_group,
)
from sdr_kernels.temporal_conv3d import check_clips, check_weight, conv3d_branches


class NormedBottleneck(NamedTuple):
    """The arguments of :func:`normed_bottleneck` behind x."""

    a: NormedConv
    b: NormedConv
    c: NormedConv
    branch1: NormedConv | None = None
    pool: bool = False
    time_pool: bool = False

    @property
    def convs(self) -> list[NormedConv]:
        return [conv for conv in self[:4] if conv is not None]


def normed_bottleneck_reference(
    x: Tensor, block: NormedBottleneck, bn: str = "batch", group: "dist.ProcessGroup | None" = None
) -> Normed:
    """The definition, layer by layer as an eager network runs it, each rounded to x's dtype; convolutions in it."""
    found: dict[str, list[Statistics]] = {}

    def layer(name: str, x: Tensor) -> Tensor:
        conv: NormedConv = getattr(block, name)
        out, found[name] = batch_norm_reference(conv3d_branches(x, conv.weight.to(x.dtype)), conv, bn, group)
        return out

    def max_pool(x: Tensor, size: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])

    shortcut = x if block.branch1 is None else layer("branch1", x)
    h = layer("b", layer("a", x).relu())
    if block.pool:
        shortcut, h = max_pool(shortcut, (1, 2, 2)), max_pool(h, (1, 2, 2))
    out = (layer("c", h.relu()) + shortcut).relu()
    statistics = [each for name in NormedBottleneck._fields[:4] for each in found.get(name, [])]
    return Normed(max_pool(out, (2, 1, 1)) if block.time_pool else out, statistics)


class _NormedBottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scheme, plan, eps, *tensors):
        size = len(NormedConv._fields) - 1
        convs = [NormedConv(*tensors[i * size : (i + 1) * size], each) for i, each in enumerate(eps)]
        scheme = SCHEMES[scheme](plan, x.dtype)
        kept = scheme.forward(x.movedim(2, -1).contiguous(), convs)
        ctx.save_for_backward(*kept.flatten())
        ctx.scheme, ctx.plan, ctx.dtypes = type(scheme), plan, [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        moments = [moment.clone() for moment in scheme.statistics]  # a mean is kept too
        ctx.mark_non_differentiable(*moments)
        return kept.y.movedim(-1, 2), *moments

    @staticmethod
    @differentiable_once
    def backward(ctx, dout, *_moments):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = Kept.unflatten(ctx.saved_tensors)
        dy = dout.movedim(2, -1).contiguous()
        dx, layers = ctx.scheme(ctx.plan, dy.dtype).backward(kept, dy, ctx.needs_input_grad[0])
        gradients = [gradient for layer in layers for gradient in (*layer, None, None)]
        gradients = [in_dtype(g, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None if dx is None else dx.movedim(-1, 2), None, None, None, *gradients


def normed_bottleneck(
    x: Tensor,
    block: NormedBottleneck,
    *,
    scheme: str = "gram",
    bn: str = "batch",
    group: "dist.ProcessGroup | None" = None,
    impl: str = "auto",
) -> Normed:
    """One bottleneck of every branch and clip in training, differentiable once in x and every weight, gamma and beta.

    ``relu(c(relu(pool(b(relu(a(x)))))) + pool(branch1(x)))``, then the pool over time (FTCN, ICCV 2021); each letter is
    a convolution and its batch norm. Convolutions run in x's dtype and accumulate in float32, whatever the dtype of the
    weights; statistics are float64. Running statistics are not touched: what they follow is returned.

    Args:
        x: [B, V, C_in, T, H, W], float32, float16 or bfloat16 (the CPU's own and the reference take float64 too);
            fastest where channels are innermost in memory.
        block: a, b, c and branch1 as :class:`NormedConv`, and whether 2x2 positions meet in a max-pool after b and
            branch1 (``pool``) or two frames at the end (``time_pool``), not both. Without branch1 x itself is added.
        scheme: "gram" keeps the least for the backward pass: statistics and gradients of b, c and branch1 come from
            second moments of what they read. "fused" keeps what every convolution puts out.
        bn: "batch", by this process's statistics; "sync", by those of all processes, which must bring as many clips;
            "frozen", by the running ones.
        group: the processes of "sync"; None is all.
        impl: "auto" (Triton on CUDA, the CPU's own on a CPU, else the reference), "reference", "cpu" or "triton".

    Returns:
        ``out``, [B, V, C_out, T', H', W'] of x's dtype, channels innermost in memory where the reference did not run;
        ``statistics`` of a, b, c and branch1.

    Raises:
        ValueError: a name, rank, shape, device or kernel size is wrong, a pool has nothing to pool, a norm has one row
            alone, or there are no processes to share statistics with.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here.
    """
    group = process_group(bn, group)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    check_normed_bottleneck(x, block, bn)
    no_tile = "x must not be float64" if x.dtype == torch.float64 else ""
    impl = select_impl(impl, x, has_cpu=True, no_tile=no_tile)
    if impl == "reference":
        return normed_bottleneck_reference(x, block, bn, group)
    eps = tuple(conv.eps for conv in block.convs)
    plan = Plan(block.pool, block.time_pool, bn == "frozen", group, impl)
    tensors = [tensor for conv in block.convs for tensor in conv.tensors]
    out, *moments = _NormedBottleneck.apply(x, scheme, plan, eps, *tensors)
    if bn == "frozen":
        return Normed(out, [])
    rows = [Batch.of(number, group).rows for number in rows_put_out(x, block)]
    return Normed(out, [Statistics(*moments[2 * i : 2 * i + 2], number) for i, number in enumerate(rows)])


def rows_put_out(x: Tensor, block: NormedBottleneck) -> list[int]:
    """Of one branch, by a, b, c and branch1."""
    B, _, _, T, H, W = x.shape
    full = B * T * H * W
    return [full, full, B * T * (H // 2) * (W // 2) if block.pool else full, full][: len(block.convs)]


def check_normed_bottleneck(x: Tensor, block: NormedBottleneck, bn: str) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_clips(x)
    C_in, T, H, W = x.shape[2:]
    a, b, c, branch1, pool, time_pool = block
    check_weight("a's weight", a.weight, x, C_in)
    inner = a.weight.shape[1]
    check_weight("b's weight", b.weight, x, inner)
    check_weight("c's weight", c.weight, x, b.weight.shape[1])
    C_out = c.weight.shape[1]
    if branch1 is not None:
        check_weight("branch1's weight", branch1.weight, x, C_in, C_out)
    elif pool or C_in != C_out:
        raise ValueError(f"branch1 must be given with a pool or where C_in is not C_out, got {C_in}, {C_out}, {pool=}")
    if pool and time_pool:
        raise ValueError("time_pool must not go with pool")
    if pool and min(H, W) < 2:
        raise ValueError(f"x must have H and W of at least 2 for a pool, got {list(x.shape)}")
    if time_pool and T < 2:
        raise ValueError(f"x must have T of at least 2 for a pool over time, got {list(x.shape)}")
    for name, conv, rows in zip(("a", "b", "c", "branch1"), block.convs, rows_put_out(x, block), strict=False):
        if name != "a" and conv.weight.shape[-1] != 1:
            raise ValueError(f"{name}'s weight must have k = 1, got {list(conv.weight.shape)}")
        check_normed(name, conv, x, rows, bn)
