"""Stem on a CPU: each frame is one product of its 3 * k colour planes, pooled band by band while still in cache."""

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
BAND_BYTES = 4 << 20  # of the convolution's result at full resolution, all of it that exists at a time


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
    """clip: [3, T, H, W] to float32 frames, normalised, even columns before odd ones, [T + k - 1, 3, H', 2, W / 2].

    H' is even: an odd last row or column is in no pool. At both ends are k // 2 frames of zeros.
    """
    _, T, H, W = clip.shape
    frames = clip.new_empty((T + k - 1, 3, H // 2 * 2, 2, W // 2), dtype=torch.float32)
    frames[: k // 2], frames[k // 2 + T :] = 0, 0
    columns = clip[:, :, : H // 2 * 2, : W // 2 * 2].unflatten(3, (W // 2, 2))
    inside = frames[k // 2 : k // 2 + T].copy_(columns.permute(1, 0, 2, 4, 3))
    if mean is not None:
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (mean, std))
        inside.div_(255).sub_(mean).div_(std)
    return frames


def _stem(taps: Tensor, shift: Tensor, group: tuple[Tensor, Tensor]) -> None:
    """taps: [k * 3, C]; shift: [C]; group: frames, [T + k - 1, 3, H, 2, W / 2], and their result, [T, H', W', C]."""
    frames, out = group
    H, _, half = frames.shape[2:]
    planes, C = taps.shape
    rows = min(H, max(2, BAND_BYTES // (8 * half * C) // 2 * 2))
    band, pooled = frames.new_empty(rows * 2 * half, C), frames.new_empty(H // 2, half, C)
    for t, result in enumerate(out):
        patches = frames[t : t + planes // 3].view(planes, H * 2 * half).t()
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            place = slice(top * 2 * half, bottom * 2 * half)
            y = torch.mm(patches[place], taps, out=band[: place.stop - place.start])
            quads = y.view(-1, 2, 2, half, C)  # two rows of even and odd columns: long runs, where pairs are short
            even, odd = torch.maximum(quads[:, 0], quads[:, 1]).unbind(1)
            torch.maximum(even, odd, out=pooled[top // 2 : bottom // 2])
        y = max_of_threes(max_of_threes(pooled, 0), 1)
        torch.add(y, shift, out=result).relu_()
