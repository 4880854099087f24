"""Bottlenecks on a CPU: slabs of rows side by side, each through all blocks while it is in the cache.

Positions only meet in pools, so slabs between which there is no pool are networks of their own, and no thread waits for
another before the end. Channels are innermost: a row of a product is one (frame, position), a convolution a product of
rows and weights, and a temporal tap a shift by whole frames.
"""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from sdr_kernels._cpu.pooling import max_of_pairs
from sdr_kernels._cpu.products import add_product, multiply, pack
from sdr_kernels._cpu.workers import side_by_side
from sdr_kernels._ops import empty_channels_last
from sdr_kernels.temporal_bottleneck import bottleneck_shape

MIN_SLAB = 4  # rows of the first block's map; products of fewer take longer for the same work
MAX_PACKED = 512  # input channels of branch1, whose products are the result and may round no more than torch's
MIN_WINOGRAD = 128  # input channels from which fewer products are worth the sums of frames that they take


class _Layer(NamedTuple):
    """A convolution and the batch norm after it, as one convolution in float32; weights are [C_out, C_in]."""

    taps: Sequence[Tensor]
    bias: Tensor  # [C_out]
    factors: Sequence[Tensor] | None = None  # Winograd's four


class _Block(NamedTuple):
    """A bottleneck of one branch; where there is a branch1, its bias is in c's."""

    a: _Layer
    b: _Layer
    c: _Layer
    branch1: _Layer | None
    pool: bool
    time_pool: bool


def temporal_bottleneck_fwd(x: Tensor, *arguments: Tensor | bool | None) -> Tensor:
    """A chain of one."""
    *layers, pool, time_pool = arguments
    return bottleneck_chain_fwd(x, layers, [pool], [time_pool])


def bottleneck_chain_fwd(
    x: Tensor, layers: Sequence[Tensor | None], pools: Sequence[bool], time_pools: Sequence[bool]
) -> Tensor:
    """In float32; only the result has x's dtype. layers: weight, scale and shift of a, b, c, branch1 of every block."""
    shape = bottleneck_shape(x, layers[-6].shape[1], pools, time_pools)  # c's weight, of the last block
    out = empty_channels_last(x, shape)
    height = max(MIN_SLAB, 1 << sum(pools))
    slabs = []
    for v in range(x.shape[1]):
        for clip, result in zip(x[:, v].movedim(1, -1), out[:, v].movedim(1, -1), strict=True):
            parts = zip(clip.split(height, 1), result.split(height >> sum(pools), 1), strict=False)  # drops odd rows
            slabs += [(v, *part) for part in parts]
    chains = _fold_chains(x, layers, pools, time_pools, Counter((v, part.shape[1]) for v, part, _ in slabs))
    side_by_side(_run_slab, [(chains[v, part.shape[1]], part, result) for v, part, result in slabs])
    return out


def _fold_chains(
    x: Tensor,
    layers: Sequence[Tensor | None],
    pools: Sequence[bool],
    time_pools: Sequence[bool],
    slabs: Counter[tuple[int, int]],
) -> dict[tuple[int, int], list[_Block]]:
    """The blocks for slabs of a branch and a height, of which ``slabs`` counts how many there are."""

    def fold(item: tuple[int, int, int]) -> _Block:
        v, height, i = item
        frames, _, width = bottleneck_shape(x, 0, pools[:i], time_pools[:i])[3:]
        slab = frames, height >> sum(pools[:i]), width, slabs[v, height]
        return _fold_block(v, layers[12 * i : 12 * i + 12], pools[i], time_pools[i], *slab)

    items = [(*key, i) for key in slabs for i in range(len(pools))]
    # weights are packed for the number of threads that runs them, which is all for a single slab
    folded = [fold(item) for item in items] if slabs.total() == 1 else side_by_side(fold, items, even_one=True)
    return {key: folded[n * len(pools) : (n + 1) * len(pools)] for n, key in enumerate(slabs)}


def _fold_block(
    v: int,
    layers: Sequence[Tensor | None],
    pool: bool,
    time_pool: bool,
    frames: int,
    height: int,
    width: int,
    slabs: int,
) -> _Block:
    """Branch v's, for this many slabs of that size at the block's input."""
    a, b, c, branch1 = (_fold(v, *layers[i : i + 3]) for i in range(0, 12, 3))
    rows, channels = frames * height * width, a.taps[0].shape[1]
    pooled = frames * (height // 2) * (width // 2) if pool else rows
    if branch1 is not None:  # a constant may pass the pool, where there is less to add it to
        c = c._replace(bias=branch1.bias + c.bias)
        if channels <= MAX_PACKED:
            branch1 = _pack(branch1, rows, slabs)
    if len(a.taps) == 3 and channels >= MIN_WINOGRAD and frames > 1:  # the taps are for an odd last frame: left plain
        factors = _winograd_factors(a.taps)
        a = a._replace(factors=[pack(factor, frames // 2 * height * width, slabs) for factor in factors])
    else:
        a = _pack(a, rows, slabs)
    return _Block(a, _pack(b, rows, slabs), _pack(c, pooled, slabs), branch1, pool, time_pool)


def _fold(v: int, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> _Layer | None:
    if weight is None:
        return None
    taps = weight[v].float() if scale is None else weight[v].float() * scale[v, :, None, None]
    return _Layer(taps.permute(2, 0, 1).contiguous().unbind(), shift[v].contiguous())


def _pack(layer: _Layer, rows: int, times: int) -> _Layer:
    return layer._replace(taps=[pack(tap, rows, times) for tap in layer.taps])


def _run_slab(slab: tuple[Sequence[_Block], Tensor, Tensor]) -> None:
    """Write the blocks' result of the first tensor, [T, H, W, C_in], to the second, [T', H', W', C_out]."""
    blocks, x, out = slab
    x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for block in blocks:
        x = _run_block(x, block)
    out.copy_(x)


def _run_block(x: Tensor, block: _Block) -> Tensor:
    """x: [T, H, W, C_in], which is overwritten, to [T', H', W', C_out]."""
    a, b, c, branch1, pool, time_pool = block
    h = _convolve_relu(x, a)
    h = multiply(h, b.taps[0], b.bias)
    y = x if branch1 is None else multiply(x, branch1.taps[0])
    if pool:
        y, h = (max_of_pairs(max_of_pairs(z, -3), -2) for z in (y, h))
    add_product(y, h.relu_(), c.taps[0], c.bias)
    return (max_of_pairs(y, -4) if time_pool else y).relu_()


def _convolve_relu(x: Tensor, layer: _Layer) -> Tensor:
    """x: [T, H, W, C_in] to [T, H, W, C_out]; by Winograd's minimal filtering where the layer has its factors."""
    if layer.factors is not None:
        h = _winograd_relu(x, layer)
        if isfinite(h.sum().item()):  # else perhaps for differences of infinities, which the definition does not take
            return h
    return _convolve(x, layer).relu_()


def _convolve(x: Tensor, layer: _Layer) -> Tensor:
    """Tap by tap, zero-padded in time."""
    T, k = len(x), len(layer.taps)
    out = multiply(x, layer.taps[k // 2], layer.bias)
    for tap in range(k):
        offset = tap - k // 2
        inside = T - abs(offset)
        if offset and inside > 0:
            shifted = x[max(0, offset) :][:inside]
            add_product(out[max(0, -offset) :][:inside], shifted, layer.taps[tap])
    return out


def _winograd_factors(taps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the sums of frames are multiplied by: the filter's transform in F(2, 3), its last row negated."""
    first, middle, last = taps
    outer, half = (first + last) / 2, middle / 2
    return first, outer + half, outer - half, -last


def _winograd_relu(x: Tensor, layer: _Layer) -> Tensor:
    """Two frames by four products instead of six: F(2, 3) of Lavin and Gray (CVPR 2016).

    Longer tiles would take fewer products, but round a frame by frames that it does not depend on.
    """
    end = len(x) // 2 * 2
    even, odd = x[:end:2], x[1:end:2]
    d = even + odd
    both = multiply(d, layer.factors[1], layer.bias)
    torch.sub(odd, even, out=d)
    apart = multiply(d, layer.factors[2])
    outputs = both + apart, both.sub_(apart)
    torch.neg(odd[0], out=d[0])
    torch.sub(odd[:-1], odd[1:], out=d[1:])
    add_product(outputs[0], d, layer.factors[0])
    torch.sub(even[:-1], even[1:], out=d[:-1])
    torch.sub(even[-1], x[end] if end < len(x) else 0, out=d[-1])
    add_product(outputs[1], d, layer.factors[3])
    h = x.new_empty(*x.shape[:3], len(layer.bias))
    for parity, y in enumerate(outputs):
        torch.clamp_min(y, 0, out=h[parity:end:2])
    if end < len(x):
        h[end:] = _convolve(x[end - 1 :], layer)[1:].relu_()
    return h
