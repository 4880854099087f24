"""Marks where the stages of a network begin: identities, to which a profile listens.

The model passes what enters a stage through :func:`enter`. Where no profile runs this is one look at a global; nothing
is hooked or copied. Where one runs, it hears when each stage begins, in the forward pass and in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

START = "start"  # until the first stage begins
LOSS, OPTIMISER = "loss", "optimiser"  # of an update, after the model's own stages
Listener = Callable[[str, bool], None]  # the stage that begins, and whether in the backward pass


class _Watch:
    """A listener, and the stage that runs in the forward pass."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.stage = listener, START
        self._hooked: Tensor | None = None

    def enter(self, name: str, x: Tensor) -> Tensor:
        # of several stages that begin with the same tensor, it was made by the one before the first
        if x.requires_grad and x is not self._hooked:
            before = self.stage
            # runs when x's gradient is complete, right before the backward pass of what made x
            x.register_hook(lambda grad: self.listener(before, True))
            self._hooked = x
        self.stage = name
        self.listener(name, False)
        return x


_watch: _Watch | None = None


def enter(name: str, x: Tensor) -> Tensor:
    """x itself, with which the stage ``name`` begins, and that of whatever came before ends."""
    return x if _watch is None else _watch.enter(name, x)


def begin(name: str, *, backward: bool = False) -> None:
    """Say that a stage begins, where there is no tensor whose gradient would say it."""
    if _watch is not None:
        _watch.stage = _watch.stage if backward else name
        _watch.listener(name, backward)


def watched() -> bool:
    """Whether a profile listens, so that stages that could run as one must run one by one."""
    return _watch is not None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` wherever a stage begins, on any thread; one listener at a time, from ``START``.

    Raises:
        RuntimeError: another one listens.
    """
    global _watch
    if _watch is not None:
        raise RuntimeError("only one profile can listen at a time")
    _watch = _Watch(listener)
    try:
        listener(START, False)
        yield
    finally:
        _watch = None
