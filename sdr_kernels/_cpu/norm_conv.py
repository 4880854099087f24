"""Convolutions of training in plain torch; see :mod:`sdr_kernels._rows`."""

import torch
from torch import Tensor

from sdr_kernels._cpu.rows import affine, convolve, normed, pack_code, per_channel, pool_rows
from sdr_kernels._rows import empty_code


def conv_moments(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = convolve(normed(x, scale, shift), weight).to(x.dtype)
    rows = out[:, 0, ..., 0].numel()
    mean = out.sum((0, 2, 3, 4), dtype=torch.float64) / rows  # [V, C]
    squares = torch.zeros_like(mean)
    for clip in out:  # one at a time, to save memory
        squares += (clip - per_channel(mean)).square().sum((1, 2, 3))
    return out, torch.stack([mean, squares / rows], 1)


def conv_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    out_scale: Tensor,
    out_shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    pool: int,
    coded: bool,
) -> tuple[Tensor, Tensor]:
    out = affine(convolve(normed(x, scale, shift), weight), out_scale, out_shift)
    if residual is not None:
        out += residual
    return pooled(out, relu, pool, coded, x.dtype)


def pooled(out: Tensor, relu: bool, pool: int, coded: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The end of both: pool, ReLU, rounding, code."""
    out, code = pool_rows(out, pool)
    out = (out.relu() if relu else out).to(dtype)
    return out, pack_code(code) if coded else empty_code(out, wanted=False)
