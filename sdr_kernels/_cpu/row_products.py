"""Sums of products over rows in plain torch; see :mod:`sdr_kernels._rows`."""

import torch
from torch import Tensor

from sdr_kernels._cpu.rows import flat, gradient_rows, normed, shifted, widen


def products(x: Tensor, g: Tensor) -> Tensor:
    """[B, V, T, H, W, K] and [B, V, T, H, W, N] to [V, K, N], each clip's in float32 or wider."""
    return (flat(widen(x)).transpose(-1, -2) @ flat(widen(g))).sum(0, dtype=torch.float64)


def row_products(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    x = normed(x, scale, shift)
    g = gradient_rows(d, y, code, pool, z, coef, size=x.shape[2:5])
    sums = g.sum((0, 2, 3, 4), dtype=torch.float64)
    g = g.to(x.dtype)
    return torch.stack([products(shifted(x, tap, kernel_size), g) for tap in range(kernel_size)], 1), sums


def gram(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    x = normed(x, scale, shift)
    return products(x, x), x.sum((0, 2, 3, 4), dtype=torch.float64)
