"""Convolutions of training in plain torch; see :mod:`sdr_kernels._rows`."""

import torch
from torch import Tensor

from sdr_kernels._cpu.rows import affine, convolve, normed, pack_code, pool_rows
from sdr_kernels._rows import empty_code


def conv_moments(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = convolve(normed(x, scale, shift), weight).to(x.dtype)
    rows = out.transpose(0, 1).flatten(1, 4).double()  # [V, M, C]
    var, mean = torch.var_mean(rows, 1, correction=0)
    return out, torch.stack([mean, var], 1)


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
