"""Bottlenecks on a CPU: slabs of rows side by side, each through all blocks while it is in the cache.

Positions only meet in pools, so slabs between which there is no pool are networks of their own, and no thread waits for
another before the end. Channels are innermost: a row of a product is one (frame, position), a convolution a product of
rows and weights, and a temporal tap a shift by whole frames.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sdr_kernels._cpu.pooling import max_of_pairs
from sdr_kernels._cpu.workers import side_by_side
from sdr_kernels._ops import empty_channels_last

MIN_SLAB = 4  # rows of the first block's map; products of fewer take longer for the same work
MIN_WINOGRAD = 128  # input channels from which fewer products are worth the sums of frames that they take


class _Layer(NamedTuple):
    """A convolution and the batch norm after it, as one convolution in float32."""

    taps: Tensor  # [k, C_in, C_out]
    bias: Tensor  # [C_out]
    factors: Tensor | None = None  # [6, C_in, C_out], Winograd's


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
    B, V, _, T, H, W = x.shape
    out = empty_channels_last(x, (B, V, layers[-6].shape[1], T >> sum(time_pools), H >> sum(pools), W >> sum(pools)))
    rows = max(MIN_SLAB, 1 << sum(pools))
    for v in range(V):
        per_block = [
            (layers[12 * i : 12 * i + 12], *pair) for i, pair in enumerate(zip(pools, time_pools, strict=True))
        ]
        blocks = side_by_side(partial(_fold_block, v), per_block)
        slabs = []
        for clip, result in zip(x[:, v].movedim(1, -1), out[:, v].movedim(1, -1), strict=True):
            slabs += zip(clip.split(rows, 1), result.split(rows >> sum(pools), 1), strict=False)  # odd rows are dropped
        side_by_side(partial(_run_slab, blocks), slabs)
    return out


def _fold_block(v: int, block: tuple[Sequence[Tensor | None], bool, bool]) -> _Block:
    layers, pool, time_pool = block
    a, b, c, branch1 = (_fold(v, *layers[i : i + 3]) for i in range(0, 12, 3))
    if len(a.taps) == 3 and a.taps.shape[1] >= MIN_WINOGRAD:
        a = a._replace(factors=_winograd_factors(a.taps))
    if branch1 is not None:  # a constant may pass the pool, where there is less to add it to
        c = c._replace(bias=branch1.bias + c.bias)
    return _Block(a, b, c, branch1, pool, time_pool)


def _fold(v: int, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> _Layer | None:
    """Branch v; no copy where the scale is in the weights and these are float32 in the kernels' order of memory."""
    if weight is None:
        return None
    taps = weight[v].float() if scale is None else weight[v].float() * scale[v, :, None, None]
    return _Layer(taps.permute(2, 1, 0).contiguous(), shift[v])


def _run_slab(blocks: Sequence[_Block], slab: tuple[Tensor, Tensor]) -> None:
    """Write the blocks' result of the first, [T, H, W, C_in], to the second, [T', H', W', C_out]."""
    x, out = slab
    x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for block in blocks:
        x = _run_block(x, block)
    out.copy_(x)


def _run_block(x: Tensor, block: _Block) -> Tensor:
    """x: [T, H, W, C_in], which is overwritten, to [T', H', W', C_out]."""
    a, b, c, branch1, pool, time_pool = block
    h = _convolve_relu(x, a)
    h = torch.addmm(b.bias, _rows(h), b.taps[0]).relu_().view(h.shape)
    if branch1 is None:
        y = x.add_(c.bias)
    elif pool:
        y = torch.mm(_rows(x), branch1.taps[0]).view(*x.shape[:3], -1)
        y, h = (max_of_pairs(max_of_pairs(z, -3), -2) for z in (y, h))
        y += c.bias
    else:
        y = torch.addmm(c.bias, _rows(x), branch1.taps[0]).view(*x.shape[:3], -1)
    _rows(y).addmm_(_rows(h), c.taps[0]).relu_()
    return max_of_pairs(y, -4) if time_pool else y


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _convolve_relu(x: Tensor, layer: _Layer) -> Tensor:
    """x: [T, H, W, C_in] to [T, H, W, C_out]; by Winograd's minimal filtering where the layer has its factors."""
    if layer.factors is not None and len(x) >= 4:
        h = _winograd_relu(x, layer)
        if h.sum().isfinite():  # else perhaps for infinities, of which it takes differences and the definition does not
            return h
    return _convolve(x, layer).relu_()


def _convolve(x: Tensor, layer: _Layer) -> Tensor:
    """Tap by tap, zero-padded in time."""
    T, k = len(x), len(layer.taps)
    out = torch.addmm(layer.bias, _rows(x), layer.taps[k // 2]).view(*x.shape[:3], -1)
    for tap in range(k):
        offset = tap - k // 2
        inside = T - abs(offset)
        if offset and inside > 0:
            shifted = x[max(0, offset) :][:inside]
            _rows(out[max(0, -offset) :][:inside]).addmm_(_rows(shifted), layer.taps[tap])
    return out


def _winograd_factors(taps: Tensor) -> Tensor:
    """What the sums of frames are multiplied by: the filter in F(4, 3), at points 0, 1, -1, 2, -2 and infinity.

    taps: [3, C_in, C_out]; returns [6, C_in, C_out].
    """
    rows = [6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]
    return torch.tensordot(taps.new_tensor(rows) / 24, taps, 1)


def _winograd_relu(x: Tensor, layer: _Layer) -> Tensor:
    """Four frames by six products instead of twelve: F(4, 3) of Lavin and Gray (CVPR 2016); a rest tap by tap."""
    end = len(x) // 4 * 4
    d1, d2, d3, d4 = (x[i:end:4] for i in range(4))  # the frames of the results; d0 comes before and d5 after them
    p, q = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    d = p + q
    m1 = torch.addmm(layer.bias, _rows(d), layer.factors[1])
    m2 = torch.mm(_rows(torch.sub(p, q, out=d)), layer.factors[2])
    torch.sub(d4, d2, out=p)
    torch.sub(d3, d1, out=q)
    m3 = torch.mm(_rows(torch.add(p, q, alpha=2, out=d)), layer.factors[3])
    m4 = torch.mm(_rows(torch.sub(p, q, alpha=2, out=d)), layer.factors[4])
    inner, outer, outer_difference = m1 + m2, m3 + m4, m3.sub_(m4)
    inner_difference = m1.sub_(m2)
    y = [
        inner + outer,
        torch.add(inner_difference, outer_difference, alpha=2),
        inner.add_(outer, alpha=4),
        inner_difference.add_(outer_difference, alpha=8),
    ]
    torch.neg(d2[0], out=d[0])
    torch.sub(d4[:-1], d2[1:], out=d[1:])
    y[0].addmm_(_rows(p.add_(d, alpha=4)), layer.factors[0])  # 4 d0 - 5 d2 + d4
    torch.sub(x[end] if end < len(x) else 0, d3[-1], out=d[-1])
    torch.sub(d1[1:], d3[:-1], out=d[:-1])
    y[3].addmm_(_rows(d.sub_(q, alpha=4)), layer.factors[5])  # 4 d1 - 5 d3 + d5
    h = x.new_empty(*x.shape[:3], len(layer.bias))
    for i, values in enumerate(y):
        frames = h[i:end:4]
        torch.clamp_min(values.view(frames.shape), 0, out=frames)
    if end < len(x):
        h[end:] = _convolve(x[end - 1 :], layer)[1:].relu_()
    return h
