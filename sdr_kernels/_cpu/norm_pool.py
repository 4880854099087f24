"""Batch norm, residual, pool and ReLU of training in plain torch; see :mod:`sdr_kernels._rows`."""

from torch import Tensor

from sdr_kernels._cpu.norm_conv import pooled
from sdr_kernels._cpu.rows import affine


def norm_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
    pool: int,
    coded: bool,
) -> tuple[Tensor, Tensor]:
    out = affine(x, scale, shift)
    if residual is not None:
        out += affine(residual, residual_scale, residual_shift)
    return pooled(out, relu, pool, coded, x.dtype)
