"""Stem on a CPU: products of a frame's 3 * k colour planes, pooled band by band while still in cache."""

from collections.abc import Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from sdr_kernels._cpu.pooling import max_of_threes
from sdr_kernels._cpu.workers import side_by_side
from sdr_kernels._ops import empty_channels_last
from sdr_kernels.temporal_stem import stem_shape

GROUP = 4  # frames that a thread takes at a time
BAND_BYTES = 2 << 20  # of the convolution's result at one of four pixels, of which two exist at a time


def temporal_stem_fwd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """The stem of every clip and branch, one after the other, in float32; only the result has weight's dtype."""
    V, C, _, k = weight.shape
    out = empty_channels_last(weight, stem_shape(x, weight))
    # the scale goes into the weights before the pools, so that its sign may be either
    taps = (weight.float() * scale[..., None, None]).permute(0, 3, 2, 1).reshape(V, k * 3, C)
    for i, clips in enumerate(x):
        for v in range(V):
            if v == 0 or clips.ndim == 5:
                frames = _padded_frames(clips[v] if clips.ndim == 5 else clips, k, mean, std)
            groups = [
                (frames[t : t + len(result) + k - 1], result)
                for t, result in zip(count(0, GROUP), out[i, v].movedim(0, -1).split(GROUP), strict=False)
            ]
            side_by_side(partial(_stem, taps[v], shift[v]), groups)
    return out


def _padded_frames(clip: Tensor, k: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """clip: [3, T, H, W] to float32 frames, normalised, [T + k - 1, 3, 4, H // 2, W // 2]: four pixels are one's pool.

    An odd last row or column is in no pool. At both ends are k // 2 frames of zeros.
    """
    _, T, H, W = clip.shape
    frames = clip.new_empty((T + k - 1, 3, 2, 2, H // 2, W // 2), dtype=torch.float32)
    frames[: k // 2], frames[k // 2 + T :] = 0, 0
    pixels = clip[:, :, : H // 2 * 2, : W // 2 * 2].unflatten(3, (W // 2, 2)).unflatten(2, (H // 2, 2))
    inside = frames[k // 2 : k // 2 + T].copy_(pixels.permute(1, 0, 3, 5, 2, 4))
    if mean is not None:
        mean, std = (torch.tensor(values).view(3, 1, 1, 1, 1) for values in (mean, std))
        inside.div_(255).sub_(mean).div_(std)
    return frames.flatten(2, 3)


def _stem(taps: Tensor, shift: Tensor, group: tuple[Tensor, Tensor]) -> None:
    """taps: [k * 3, C]; shift: [C]; group: padded frames, [T + k - 1, 3, 4, H, W], and results, [T, H', W', C]."""
    frames, out = group
    H, W = frames.shape[3:]
    planes, C = taps.shape
    pooled = frames.new_empty(H, W, C)
    bands = pooled.view(H * W, C).split(max(1, BAND_BYTES // (4 * W * C)) * W)
    other = torch.empty_like(bands[0])
    for t, result in enumerate(out):
        first, *others = frames[t : t + planes // 3].view(planes, 4, H * W).unbind(1)
        start = 0
        for band in bands:
            place = slice(start, start + len(band))
            torch.mm(first[:, place].t(), taps, out=band)
            for pixels in others:
                torch.maximum(band, torch.mm(pixels[:, place].t(), taps, out=other[: len(band)]), out=band)
            start = place.stop
        y = max_of_threes(max_of_threes(pooled, 0), 1)
        torch.add(y, shift, out=result).relu_()
