"""Bottleneck on a CPU: products of rows in chunks of frames, from x to the result while they are in the cache.

Channels are innermost, so a row is one (frame, position), a convolution a product of rows and weights, and a temporal
tap a shift by whole frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sdr_kernels._cpu.memory import empty_result
from sdr_kernels._cpu.pooling import max_of_pairs
from sdr_kernels._ops import channels_last

CHUNK_ROWS = 3136  # 3 MB of 256 channels: products of more rows leave the cache, of fewer wait for threads


class _Layer(NamedTuple):
    """A convolution and the batch norm after it, as one convolution in float32."""

    taps: Tensor  # [k, C_in, C_out]
    bias: Tensor  # [C_out]


def _fold(weight: Tensor, scale: Tensor, shift: Tensor) -> _Layer:
    return _Layer((weight.float() * scale[:, None, None]).permute(2, 1, 0).contiguous(), shift)


def temporal_bottleneck_fwd(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    a_shift: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_shift: Tensor,
    c: Tensor,
    c_scale: Tensor,
    c_shift: Tensor,
    branch1: Tensor | None,
    branch1_scale: Tensor | None,
    branch1_shift: Tensor | None,
    pool: bool,
    time_pool: bool,
) -> Tensor:
    """The block of every clip and branch, one after the other, in float32; only the result has x's dtype."""
    x = channels_last(x)
    B, V, _, T, H, W = x.shape
    out = empty_result(x, (B, V, c.shape[1], T // (1 + time_pool), H // (1 + pool), W // (1 + pool)))
    for v in range(V):
        layers = [_fold(a[v], a_scale[v], a_shift[v]), _fold(b[v], b_scale[v], b_shift[v])]
        layers.append(_fold(c[v], c_scale[v], c_shift[v]))
        layers.append(None if branch1 is None else _fold(branch1[v], branch1_scale[v], branch1_shift[v]))
        for i in range(B):
            _block(x[i, v].movedim(0, -1), *layers, pool, time_pool, out[i, v].movedim(0, -1))
    return out


def _block(
    x: Tensor, a: _Layer, b: _Layer, c: _Layer, branch1: _Layer | None, pool: bool, time_pool: bool, out: Tensor
) -> None:
    """x: [T, H, W, C_in]; out: [T', H', W', C_out]."""
    T, H, W, _ = x.shape
    stride, border = 1 + time_pool, len(a.taps) // 2
    chunk = max(1, CHUNK_ROWS // (H * W * stride))
    for t, result in enumerate(out.split(chunk)):
        first = t * chunk * stride
        last = first + len(result) * stride
        start = max(0, first - border)
        frames = x[start : min(T, last + border)].float()
        here = slice(first - start, last - start)
        h = _convolve(_convolve(frames, a, here).relu_(), b)
        y = frames[here] + c.bias if branch1 is None else _convolve(frames[here], branch1)
        if pool:
            h, y = (max_of_pairs(max_of_pairs(z, -3), -2) for z in (h, y))
        if branch1 is not None:
            y.add_(c.bias)
        _rows(y).addmm_(_rows(h.relu_()), c.taps[0])
        if time_pool:
            max_of_pairs(y, -4, out=result).relu_()
        else:
            torch.clamp_min(y, 0, out=result)  # ReLU and copy in one


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _convolve(x: Tensor, layer: _Layer, frames: slice = slice(None)) -> Tensor:
    """x: [T, H, W, C_in] to those frames of [T, H, W, C_out], zero-padded in time."""
    k = len(layer.taps)
    first, last, _ = frames.indices(len(x))
    out = torch.addmm(layer.bias, _rows(x[first:last]), layer.taps[k // 2]).view(-1, *x.shape[1:3], len(layer.bias))
    for tap in range(k):
        offset = tap - k // 2
        begin, end = max(first, -offset), min(last, len(x) - offset)
        if offset and begin < end:
            _rows(out[begin - first : end - first]).addmm_(_rows(x[begin + offset : end + offset]), layer.taps[tap])
    return out
