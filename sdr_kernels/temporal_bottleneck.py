"""Bottleneck of a temporal-only ResNet, batch norms folded: three convolutions, shortcut and pools in one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_same, empty_channels_last, needs_gradient, register, select_impl
from sdr_kernels.temporal_conv3d import affine, check_affine, check_clips, check_weight, conv3d_branches

MAX_INNER = 512  # the widest blocks that tiles.json has a class for: res5 of a ResNet-50


class FoldedConv(NamedTuple):
    """A convolution and the batch norm after it: ``conv(x, weight) * scale + shift``."""

    weight: Tensor  # [V, C_out, C_in, k]
    scale: Tensor | None  # [V, C_out], float32; None where it is in the weight
    shift: Tensor  # [V, C_out], float32


Triple = tuple[Tensor, Tensor | None, Tensor]  # what a FoldedConv names


class FoldedBottleneck(NamedTuple):
    """The arguments of :func:`temporal_bottleneck` behind x."""

    a: FoldedConv
    b: FoldedConv
    c: FoldedConv
    branch1: FoldedConv | None = None
    pool: bool = False
    time_pool: bool = False

    @property
    def tensors(self) -> list[Tensor | None]:
        """Weight, scale and shift of a, b, c and branch1, as the launchers take them."""
        return [tensor for layer in self[:4] for tensor in (layer or (None, None, None))]


def temporal_bottleneck_reference(
    x: Tensor,
    a: FoldedConv,
    b: FoldedConv,
    c: FoldedConv,
    branch1: FoldedConv | None = None,
    pool: bool = False,
    time_pool: bool = False,
) -> Tensor:
    """The definition, layer by layer as an eager network runs it: every layer's result is rounded to x's dtype."""

    def layer(x: Tensor, conv: FoldedConv) -> Tensor:
        return affine(conv3d_branches(x, conv.weight), conv.scale, conv.shift).to(x.dtype)

    def max_pool(x: Tensor, size: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])

    shortcut = x if branch1 is None else layer(x, branch1)
    h = layer(layer(x, a).relu(), b)
    if pool:
        shortcut, h = max_pool(shortcut, (1, 2, 2)), max_pool(h, (1, 2, 2))
    out = (layer(h.relu(), c) + shortcut).relu()
    return max_pool(out, (2, 1, 1)) if time_pool else out


def bottleneck_shape(x: Tensor, C: int, pools: Sequence[bool], time_pools: Sequence[bool]) -> tuple[int, ...]:
    """Of the result, which has C channels; a flag of each block in either sequence."""
    B, V, _, T, H, W = x.shape
    return B, V, C, T >> sum(time_pools), H >> sum(pools), W >> sum(pools)


def _fake_fwd(x: Tensor, *arguments: Tensor | bool | None) -> Tensor:
    *layers, pool, time_pool = arguments
    return _fake_chain_fwd(x, layers, [pool], [time_pool])


def _fake_chain_fwd(
    x: Tensor, layers: Sequence[Tensor | None], pools: Sequence[bool], time_pools: Sequence[bool]
) -> Tensor:
    return empty_channels_last(x, bottleneck_shape(x, layers[-6].shape[1], pools, time_pools))


_fwd = register(
    "temporal_bottleneck",
    "temporal_bottleneck_fwd",
    "(Tensor x, Tensor a, Tensor? a_scale, Tensor a_shift, Tensor b, Tensor? b_scale, Tensor b_shift, Tensor c, "
    "Tensor? c_scale, Tensor c_shift, Tensor? branch1, Tensor? branch1_scale, Tensor? branch1_shift, bool pool, "
    "bool time_pool, str impl) -> Tensor",
    fake=_fake_fwd,
)
_chain_fwd = register(
    "temporal_bottleneck",
    "bottleneck_chain_fwd",
    "(Tensor x, Tensor?[] layers, bool[] pools, bool[] time_pools, str impl) -> Tensor",
    fake=_fake_chain_fwd,
)


def temporal_bottleneck(
    x: Tensor,
    a: FoldedConv,
    b: FoldedConv,
    c: FoldedConv,
    branch1: FoldedConv | None = None,
    *,
    pool: bool = False,
    time_pool: bool = False,
    impl: str = "auto",
) -> Tensor:
    """One bottleneck of every branch and clip: a, b, c and the shortcut, each with its batch norm; for inference.

    ``relu(c(relu(pool(b(relu(a(x)))))) + pool(branch1(x)))``, then the pool over time (FTCN, ICCV 2021). Only a sees
    time: a row of b and c needs no other, so the kernel goes from x to the result tile by tile.

    Args:
        x: [B, V, C_in, T, H, W], float32, float16 or bfloat16; fastest where channels are innermost in memory.
        a: (weight, scale, shift) of [V, inner, C_in, k], k in 1, 3, 5, [V, inner] and [V, inner]; weights have x's
            dtype, scale and shift are float32; a scale of None is 1.
        b: the same of [V, inner, inner, 1].
        c: the same of [V, C_out, inner, 1].
        branch1: the same of [V, C_out, C_in, 1]; None adds x itself, which needs C_in = C_out and no ``pool``.
        pool: halve H and W, rounding down, by a 2x2 max-pool after b and after branch1.
        time_pool: halve T, rounding down, by a max-pool over two frames at the end.
        impl: "auto" (Triton on CUDA, the CPU's own on a CPU, else the reference), "reference", "cpu" or "triton".

    Returns:
        [B, V, C_out, T', H', W'] of x's dtype.

    Raises:
        ValueError: a rank, shape, device or kernel size is wrong, or a pool has nothing to pool.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here, or a gradient is asked of it.
    """
    block = fold_names(a, b, c, branch1, pool, time_pool)
    check_bottleneck(x, block)
    inner = block.a.weight.shape[1]
    no_tile = f"a must have at most {MAX_INNER} inner channels, got {inner}" if inner > MAX_INNER else ""
    impl = select_impl(impl, x, has_cpu=True, unfit=_why_unfit(x, block), no_tile=no_tile)
    if impl == "reference":
        return temporal_bottleneck_reference(x, *block)
    return _fwd(x, *block.tensors, pool, time_pool, impl)


def bottleneck_chain(x: Tensor, blocks: Sequence[FoldedBottleneck], *, impl: str = "auto") -> Tensor:
    """Bottlenecks one after the other; for inference.

    On a CPU faster than :func:`temporal_bottleneck` block by block: slabs of rows run through all blocks side by side,
    and what lies between two blocks stays in the cache, in float32. Elsewhere it is the same.

    Args:
        x: [B, V, C_in, T, H, W], as the first block takes it.
        blocks: at least one, each taking what the one before gives.
        impl: as :func:`temporal_bottleneck`'s.

    Returns:
        [B, V, C_out, T', H', W'] of x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`temporal_bottleneck`, or there is no block.
    """
    if len(blocks) == 0:
        raise ValueError("blocks must hold at least one bottleneck, got none")
    given, blocks, between = blocks, [], x
    for i, arguments in enumerate(given):
        try:
            block = fold_names(*arguments)
            check_bottleneck(between, block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"blocks[{i}]: {error}") from error
        blocks.append(block)
        shape = bottleneck_shape(between, block.c.weight.shape[1], [block.pool], [block.time_pool])
        between = x.new_empty(()).expand(shape)  # no memory, only what there is to check
    if select_impl(impl, x, has_cpu=True, unfit=_why_unfit(x, *blocks)) != "cpu":
        for *layers, pool, time_pool in blocks:
            x = temporal_bottleneck(x, *layers, pool=pool, time_pool=time_pool, impl=impl)
        return x
    tensors = [tensor for block in blocks for tensor in block.tensors]
    return _chain_fwd(x, tensors, [block.pool for block in blocks], [block.time_pool for block in blocks], "cpu")


def _why_unfit(x: Tensor, *blocks: FoldedBottleneck) -> str:
    if x.dtype == torch.float64:
        return "x must not be float64"
    return needs_gradient(x, *(tensor for block in blocks for tensor in block.tensors))


def fold_names(
    a: Triple, b: Triple, c: Triple, branch1: Triple | None = None, pool: bool = False, time_pool: bool = False
) -> FoldedBottleneck:
    """The layers by names; ValueError unless they are triples."""
    layers = {"a": a, "b": b, "c": c, "branch1": branch1}
    for name, layer in layers.items():
        if layer is not None:
            if len(layer) != 3:
                raise ValueError(f"{name} must be (weight, scale, shift), got {len(layer)} values")
            layers[name] = FoldedConv(*layer)
    return FoldedBottleneck(**layers, pool=pool, time_pool=time_pool)


def check_bottleneck(x: Tensor, block: FoldedBottleneck) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    a, b, c, branch1, pool, time_pool = block
    check_clips(x)
    V, C_in, T, H, W = x.shape[1:]
    check_weight("a's weight", a.weight, x, C_in)
    inner = a.weight.shape[1]
    check_weight("b's weight", b.weight, x, inner, inner)
    check_weight("c's weight", c.weight, x, inner)
    C_out = c.weight.shape[1]
    layers = {"a": a, "b": b, "c": c}
    if branch1 is not None:
        check_weight("branch1's weight", branch1.weight, x, C_in, C_out)
        layers["branch1"] = branch1
    elif pool or C_in != C_out:
        raise ValueError(f"branch1 must be given with a pool or where C_in is not C_out, got {C_in}, {C_out}, {pool=}")
    for name, layer in layers.items():
        if name != "a" and layer.weight.shape[-1] != 1:
            raise ValueError(f"{name}'s weight must have k = 1, got {list(layer.weight.shape)}")
        check_affine(f"{name}'s scale", layer.scale, x, (V, layer.weight.shape[1]))
        check_affine(f"{name}'s shift", layer.shift, x, (V, layer.weight.shape[1]))
        check_same("dtype", x, **{f"{name}'s weight": layer.weight})
        check_same("device", x, **{f"{name}'s {field}": value for field, value in layer._asdict().items()})
    if pool and min(H, W) < 2:
        raise ValueError(f"x must have H and W of at least 2 for a pool, got {list(x.shape)}")
    if time_pool and T < 2:
        raise ValueError(f"x must have T of at least 2 for a pool over time, got {list(x.shape)}")
