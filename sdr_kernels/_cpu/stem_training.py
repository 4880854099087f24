"""The stem of training in plain torch, a frame's convolution at a time; see :mod:`sdr_kernels._rows`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._cpu.rows import widen
from sdr_kernels._rows import empty_stem


def _patches(x: Tensor, kernel_size: int) -> Tensor:
    """x: [B, V, 3, T, H, W] to [B, V, 3k, T, H, W], 0 outside of time, in float32 or wider."""
    half = kernel_size // 2
    padded = F.pad(widen(x), (0, 0, 0, 0, half, half))
    taps = [padded[:, :, :, tap : tap + x.shape[3]] for tap in range(kernel_size)]
    return torch.stack(taps, 3).flatten(2, 3)


def patch_covariance(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    V, rows = x.shape[1], x[:, 0, 0].numel()
    products = x.new_zeros((V, 3 * kernel_size, 3 * kernel_size), dtype=torch.float64)
    mean = x.new_zeros((V, 3 * kernel_size), dtype=torch.float64)
    for clip in x:  # one at a time: patches are k times the clip
        patches = _patches(clip[None], kernel_size)[0].flatten(2).double()  # [V, 3k, T * H * W]
        products += patches @ patches.transpose(-1, -2) / rows
        mean += patches.sum(-1) / rows
    return products - mean[..., :, None] * mean[..., None, :], mean


def stem_max(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) == 0:
        return empty_stem(x, weight, scale, shift)
    outs, codes = [], []
    for clip in x:
        results = [_stem_max(*each, x.dtype) for each in zip(clip, widen(weight), scale, shift, strict=True)]
        out, code = (torch.stack(values) for values in zip(*results, strict=True))
        outs.append(out)
        codes.append(code)
    return torch.stack(outs), torch.stack(codes)


def _stem_max(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One clip of one branch: x [3, T, H, W], weight [C, 3, k] to [T, H', W', C] twice."""
    outs, codes = [], []
    patches = _patches(x[None, None], weight.shape[-1])[0, 0]  # [3k, T, H, W]
    for frame in patches.unbind(1):
        z = torch.tensordot(weight.flatten(1), frame, 1) * scale[:, None, None] + shift[:, None, None]  # [C, H, W]
        pooled, corner = F.max_pool2d(z, 2, return_indices=True)
        out, cell = F.max_pool2d(pooled.relu(), 3, 2, 1, return_indices=True)
        pixel = corner.flatten(1).gather(1, cell.flatten(1)).view_as(cell)  # of the frame, flat
        row, column = pixel // x.shape[-1], pixel % x.shape[-1]
        i = row + 2 - 4 * torch.arange(out.shape[1], device=x.device)[:, None]  # in the window of 6 x 6
        j = column + 2 - 4 * torch.arange(out.shape[2], device=x.device)
        code = 4 * (3 * (i // 2) + j // 2) + 2 * (i % 2) + j % 2
        outs.append(out.movedim(0, -1).to(dtype))
        codes.append(code.movedim(0, -1).to(torch.uint8))
    return torch.stack(outs), torch.stack(codes)


def stem_products(x: Tensor, d: Tensor, y: Tensor, code: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    V, C = d.shape[1], d.shape[-1]
    rows, columns = (torch.arange(size, device=x.device) for size in d.shape[3:5])
    products = x.new_zeros((V, C, 3 * kernel_size), dtype=torch.float64)
    g = widen(d).masked_fill(y <= 0, 0)
    for clip, gradients, codes in zip(x, g, code.long(), strict=True):
        i = 4 * rows[:, None, None] - 2 + 2 * (codes // 12) + codes // 2 % 2
        j = 4 * columns[:, None] - 2 + 2 * (codes // 4 % 3) + codes % 2
        pixel = (i * x.shape[-1] + j).movedim(-1, 1).flatten(3)  # [V, C, T, H' * W']
        gradients = gradients.movedim(-1, 1).flatten(3)
        for part, values in enumerate(_patches(clip[None], kernel_size)[0].flatten(3).unbind(1)):
            chosen = values[:, None].expand(-1, C, -1, -1).gather(3, pixel)
            products[:, :, part] += (chosen * gradients).sum((2, 3), dtype=torch.float64)
    return products, g.sum((0, 2, 3, 4), dtype=torch.float64)
