"""Rows as training reads them, in plain torch: normed, pooled with a code, gradients; see :mod:`sdr_kernels._rows`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._rows import pooled_size


def widen(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(value: Tensor) -> Tensor:
    """[V, C] as [V, 1, 1, 1, C]."""
    return value[:, None, None, None]


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return widen(x) if scale is None else widen(x) * per_channel(scale) + per_channel(shift)


def normed(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """relu(x * scale + shift) in x's dtype, or x where there is no scale."""
    return x if scale is None else affine(x, scale, shift).relu_().to(x.dtype)


def corners(x: Tensor, pool: int) -> list[Tensor]:
    """Views of the rows that meet in a pool, in the order of its code."""
    if pool == 1:
        return [x]
    T, H, W = pooled_size(x.shape[2:5], pool)
    if pool == 2:
        return [x[:, :, i : 2 * T : 2] for i in range(2)]
    return [x[:, :, :, i : 2 * H : 2, j : 2 * W : 2] for i in range(2) for j in range(2)]


def pool_rows(x: Tensor, pool: int) -> tuple[Tensor, Tensor | None]:
    """The maximum, and which it was, uint8 of the same shape; None without a pool."""
    best, *others = corners(x, pool)
    if not others:
        return best, None
    code = torch.zeros_like(best, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for i, other in enumerate(others, 1):
        better = (other > best) | other.isnan()
        best = torch.where(better, other, best)
        code.masked_fill_(better, i)
    return best, code


def pack_code(code: Tensor) -> Tensor:
    """[.., C] of 0..3 to [.., ceil(C / 4)]."""
    code = torch.nn.functional.pad(code, (0, -code.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return code[..., 0] | code[..., 1] << 2 | code[..., 2] << 4 | code[..., 3] << 6


def unpack_code(packed: Tensor, channels: int) -> Tensor:
    """[.., ceil(C / 4)] to [.., C] of 0..3."""
    return torch.stack([packed >> i & 3 for i in (0, 2, 4, 6)], -1).flatten(-2)[..., :channels]


def gradient_rows(
    d: Tensor,
    y: Tensor | None,
    code: Tensor | None,
    pool: int,
    z: Tensor | None = None,
    coef: Tensor | None = None,
    *,
    size: Sequence[int],
) -> Tensor:
    """Gradient rows in float32 or wider, [B, V, *size, C]."""
    g = widen(d)
    if y is not None:
        g = g.masked_fill(y <= 0, 0)
    if pool > 1:
        which = unpack_code(code, d.shape[-1])
        full = g.new_zeros((*d.shape[:2], *size, d.shape[-1]))
        for i, corner in enumerate(corners(full, pool)):
            corner.copy_(g.masked_fill(which != i, 0))
        g = full
    if coef is not None:
        factor, slope, offset, center = (per_channel(value) for value in coef)
        g = g * factor + offset if z is None else g * factor + (widen(z) - center) * slope + offset
    return g


def flat(x: Tensor) -> Tensor:
    """[B, V, T, H, W, C] as [B, V, T * H * W, C]."""
    return x.flatten(2, 4)


def shifted(x: Tensor, tap: int, kernel_size: int) -> Tensor:
    """x[t + tap - k // 2], 0 outside of time."""
    frames = tap - kernel_size // 2
    if frames == 0:
        return x
    out = torch.zeros_like(x)
    if frames > 0:
        out[:, :, :-frames] = x[:, :, frames:]
    else:
        out[:, :, -frames:] = x[:, :, :frames]
    return out


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """x: [B, V, T, H, W, K] and weight: [V, k, K, N] to [B, V, T, H, W, N], in float32 or wider."""
    x, weight = widen(x), widen(weight)
    k = weight.shape[1]
    out = flat(shifted(x, k // 2, k)) @ weight[:, k // 2]
    for tap in range(k):
        if tap != k // 2:
            out += flat(shifted(x, tap, k)) @ weight[:, tap]
    return out.unflatten(2, x.shape[2:5])
