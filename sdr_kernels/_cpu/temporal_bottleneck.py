"""Bottleneck on a CPU: products of rows in chunks of frames, from x to the result while they are in the cache.

Channels are innermost, so a row is one (frame, position), a convolution a product of rows and weights, and a temporal
tap a shift by whole frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sdr_kernels._cpu.pooling import max_of_pairs
from sdr_kernels._ops import channels_last, empty_channels_last

CHUNK_ROWS = 3136  # 3 MB of 256 channels: products of more rows leave the cache, of fewer wait for threads


class _Layer(NamedTuple):
    """A convolution and the batch norm after it, as one convolution in float32."""

    taps: Tensor  # [k, C_in, C_out]
    bias: Tensor  # [C_out]


def _fold(v: int, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> _Layer | None:
    """Branch v; no copy where the scale is in the weights and these are float32 in the kernels' order of memory."""
    if weight is None:
        return None
    taps = weight[v].float() if scale is None else weight[v].float() * scale[v, :, None, None]
    return _Layer(taps.permute(2, 1, 0).contiguous(), shift[v])


def temporal_bottleneck_fwd(
    x: Tensor,
    a: Tensor, a_scale: Tensor | None, a_shift: Tensor,
    b: Tensor, b_scale: Tensor | None, b_shift: Tensor,
    c: Tensor, c_scale: Tensor | None, c_shift: Tensor,
    branch1: Tensor | None, branch1_scale: Tensor | None, branch1_shift: Tensor | None,
    pool: bool, time_pool: bool,
) -> Tensor:  # fmt: skip
    """The block of every clip and branch, one after the other, in float32; only the result has x's dtype."""
    x = channels_last(x)
    B, V, _, T, H, W = x.shape
    out = empty_channels_last(x, (B, V, c.shape[1], T // (1 + time_pool), H // (1 + pool), W // (1 + pool)))
    convs = ((a, a_scale, a_shift), (b, b_scale, b_shift), (c, c_scale, c_shift))
    for v in range(V):
        layers = [_fold(v, *conv) for conv in (*convs, (branch1, branch1_scale, branch1_shift))]
        if layers[3] is not None:  # of both summands, and a constant may pass the pool
            layers[3] = layers[3]._replace(bias=layers[3].bias + layers[2].bias)
        for i in range(B):
            _block(x[i, v].movedim(0, -1), *layers, pool, time_pool, out[i, v].movedim(0, -1))
    return out


def _block(
    x: Tensor, a: _Layer, b: _Layer, c: _Layer, branch1: _Layer | None, pool: bool, time_pool: bool, out: Tensor
) -> None:
    """x: [T, H, W, C_in]; out: [T', H', W', C_out]."""
    stride, border = 1 + time_pool, len(a.taps) // 2
    frames = max(1, CHUNK_ROWS // (x.shape[1] * x.shape[2] * stride))
    in_place = out.dtype == torch.float32 and not time_pool
    for t, result in enumerate(out.split(frames)):
        first = t * frames * stride
        last = first + len(result) * stride
        start = max(0, first - border)
        near = x[start : last + border].float()
        here = slice(first - start, last - start)
        h = _convolve(_convolve(near, a, here).relu_(), b)
        y = result if in_place else torch.empty((last - first, *out.shape[1:]))
        if branch1 is None:
            torch.add(near[here], c.bias, out=y)
        elif pool:
            h = max_of_pairs(max_of_pairs(h, -3), -2)
            max_of_pairs(max_of_pairs(_convolve(near[here], branch1), -3), -2, out=y)
        else:
            _convolve(near[here], branch1, out=y)
        _rows(y).addmm_(_rows(h.relu_()), c.taps[0]).relu_()
        if time_pool:
            max_of_pairs(y, -4, out=result)
        elif not in_place:
            result.copy_(y)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _convolve(x: Tensor, layer: _Layer, frames: slice = slice(None), out: Tensor | None = None) -> Tensor:
    """x: [T, H, W, C_in] to those frames of [T, H, W, C_out], zero-padded in time."""
    k = len(layer.taps)
    first, last, _ = frames.indices(len(x))
    out = x.new_empty((last - first, *x.shape[1:3], len(layer.bias))) if out is None else out
    torch.addmm(layer.bias, _rows(x[first:last]), layer.taps[k // 2], out=_rows(out))
    for tap in range(k):
        offset = tap - k // 2
        begin, end = max(first, -offset), min(last, len(x) - offset)
        if offset and begin < end:
            _rows(out[begin - first : end - first]).addmm_(_rows(x[begin + offset : end + offset]), layer.taps[tap])
    return out
