"""Memory for large results: first writes to fresh pages of 4 KB take as long as the layer that makes them."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._ops import empty_channels_last

FRESH_BYTES = 32 << 20  # from here on glibc maps, and the kernel clears, new pages for every allocation


def empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    """As :func:`empty_channels_last`, in pages of 2 MB where the tensor is large and the system has them."""
    nbytes = math.prod(shape) * x.element_size()
    if nbytes < FRESH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return empty_channels_last(x, shape)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    *outer, C, T, H, W = shape
    return torch.frombuffer(memory, dtype=x.dtype).view(*outer, T, H, W, C).movedim(-1, -4)
