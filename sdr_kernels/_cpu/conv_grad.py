"""Gradients of rows in plain torch; see :mod:`sdr_kernels._rows`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._cpu.rows import convolve, flat, gradient_rows, normed, per_channel, widen


def conv_grad(
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None,
    coef: Tensor | None,
    size: Sequence[int],
    weight: Tensor,
    h: Tensor | None,
    h_scale: Tensor | None,
    h_shift: Tensor | None,
    matrix: Tensor | None,
    center: Tensor | None,
    const: Tensor | None,
    residual: Tensor | None,
    residual_y: Tensor | None,
    residual_code: Tensor | None,
    residual_pool: int,
    relu: bool,
    z_center: Tensor | None,
) -> tuple[Tensor, Tensor]:
    g = gradient_rows(d, y, code, pool, z, coef, size=size).to(d.dtype)
    out = convolve(g, weight)
    normed_h = None if h is None else normed(h, h_scale, h_shift)
    if matrix is not None:
        centered = (widen(normed_h) - per_channel(center)).to(d.dtype)
        out += (flat(widen(centered)) @ widen(matrix)).unflatten(2, size)
    if const is not None:
        out += per_channel(const)
    if residual is not None:
        out += gradient_rows(residual, residual_y, residual_code, residual_pool, size=size)
    if relu:
        out.masked_fill_(normed_h <= 0, 0)
    if z_center is None:
        return out.to(d.dtype), out.new_empty((weight.shape[0], 2, 0), dtype=torch.float64)
    return out.to(d.dtype), _sums(out, h, z_center)


def grad_sums(d: Tensor, y: Tensor | None, code: Tensor | None, pool: int, z: Tensor, center: Tensor) -> Tensor:
    return _sums(gradient_rows(d, y, code, pool, size=z.shape[2:5]), z, center)


def _sums(g: Tensor, z: Tensor, center: Tensor) -> Tensor:
    """Over rows, of g and of g * (z - center), [V, 2, C]."""
    rows = (0, 2, 3, 4)
    products = g * (widen(z) - per_channel(center))
    return torch.stack([g.sum(rows, dtype=torch.float64), products.sum(rows, dtype=torch.float64)], 1)
