"""Stem on a CPU: each frame is one product of its 3 * k colour planes, pooled band by band while still in cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._cpu.memory import empty_result
from sdr_kernels._cpu.pooling import max_of_pairs, max_of_threes
from sdr_kernels.temporal_stem import stem_shape

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
    out = empty_result(weight, stem_shape(x, weight))
    # the scale goes into the weights before the pools, so that its sign may be either
    taps = (weight.float() * scale[..., None, None]).permute(0, 3, 2, 1).reshape(V, k * 3, C)
    for i, clips in enumerate(x):
        for v in range(V):
            if v == 0 or clips.ndim == 5:
                frames = _padded_frames(clips[v] if clips.ndim == 5 else clips, k, mean, std)
            _stem(frames, taps[v], shift[v], out[i, v].movedim(0, -1))
    return out


def _padded_frames(clip: Tensor, k: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """clip: [3, T, H, W] to float32 frames, normalised, with k // 2 of zeros at both ends, [T + k - 1, 3, H, W]."""
    _, T, H, W = clip.shape
    frames = clip.new_zeros((T + k - 1, 3, H, W), dtype=torch.float32)
    inside = frames[k // 2 : k // 2 + T].copy_(clip.transpose(0, 1))
    if mean is not None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        inside.div_(255).sub_(mean).div_(std)
    return frames


def _stem(frames: Tensor, taps: Tensor, shift: Tensor, out: Tensor) -> None:
    """frames: [T + k - 1, 3, H, W]; taps: [k * 3, C]; out: [T, H', W', C]."""
    _, _, H, W = frames.shape
    planes, C = taps.shape
    rows = H // 2 * 2  # an odd last row is in no pool
    band_rows = min(rows, max(2, BAND_BYTES // (4 * W * C) // 2 * 2))
    band, pooled = frames.new_empty(band_rows * W, C), frames.new_empty(H // 2, W // 2, C)
    for t, result in enumerate(out):
        patches = frames[t : t + planes // 3].view(planes, H * W).t()
        for top in range(0, rows, band_rows):
            bottom = min(top + band_rows, rows)
            y = torch.mm(patches[top * W : bottom * W], taps, out=band[: (bottom - top) * W]).view(-1, W, C)
            max_of_pairs(max_of_pairs(y, -3), -2, out=pooled[top // 2 : bottom // 2])
        y = max_of_threes(max_of_threes(pooled, 0), 1)
        torch.add(y, shift, out=result).relu_()
