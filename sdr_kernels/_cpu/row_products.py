"""Sums of products over rows in plain torch; see :mod:`sdr_kernels._rows`."""

import torch
from torch import Tensor

from sdr_kernels._cpu.rows import flat, gradient_rows, normed, per_channel, shifted, widen


def products(x: Tensor, g: Tensor) -> Tensor:
    """[B, V, T, H, W, K] and [B, V, T, H, W, N] to [V, K, N], float64."""
    total = x.new_zeros((x.shape[1], x.shape[-1], g.shape[-1]), dtype=torch.float64)
    # in float64: the differences that statistics are made of would show a float32 sum; clip by clip, to save memory
    for x_clip, g_clip in zip(flat(x), flat(g), strict=True):
        total.baddbmm_(x_clip.double().transpose(-1, -2), g_clip.double())
    return total


def row_products(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    x = normed(x, scale, shift)
    if center is not None:
        x = (widen(x) - per_channel(center)).to(x.dtype)
    g = gradient_rows(d, y, code, pool, z, coef, size=x.shape[2:5])
    sums = g.sum((0, 2, 3, 4), dtype=torch.float64)
    g = g.to(x.dtype)
    return torch.stack([products(shifted(x, tap, kernel_size), g) for tap in range(kernel_size)], 1), sums


def covariance(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    x = normed(x, scale, shift)
    rows = x[:, 0, ..., 0].numel()
    mean = x.sum((0, 2, 3, 4), dtype=torch.float64) / rows
    return products(x, x) / rows - mean[..., :, None] * mean[..., None, :], mean
