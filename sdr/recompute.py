"""Blocks whose inside is computed again in the backward pass instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, of which only x is kept; running statistics see the batch once. The module draws nothing."""
    contexts = lambda: (nullcontext(), spare_buffers(module))  # noqa: E731, two contexts, made anew for each call
    return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def spare_buffers(module: nn.Module) -> Iterator[None]:
    """Whatever is written to buffers in the block is forgotten: the first pass has written it already."""
    kept = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    for m, buffers in kept:
        m._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in kept:
            m._buffers.update(buffers)
