"""What a benchmark's answer is held to: plain PyTorch in float64, and how far plain PyTorch itself errs from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from inputs import mapped, tensors_of
from ledger import NOT_MEASURED

Call = Callable[..., object]
Check = Callable[[object], None]


class WrongAnswerError(AssertionError):
    """What is timed does not compute what it should."""


def widened(value: object) -> object:
    """The same with floating tensors in float64, which ask for a gradient where the originals do."""
    return mapped(value, lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t)


def in_float64(reference: Call) -> Call:
    """The reference of the inputs' values in float64."""
    return lambda *inputs: reference(*widened(inputs))


def clip_by_clip(reference: Call) -> Call:
    """The same of one clip after the other, joined: float64 of many clips at once does not fit a GPU."""
    exact = in_float64(reference)
    return lambda x, *rest: torch.cat([exact(clip, *rest) for clip in x.split(1)])


def matches(exact: object, plain: object, *, ties: bool = False) -> Check:
    """A check of a result: it errs at most twice what plain PyTorch errs in the same dtype, and two ulp.

    Args:
        exact: the truth, in float64.
        plain: the reference's result in the dtype of what is checked.
        ties: ReLUs and pools of batch statistics send a gradient elsewhere by rounding, so compare root mean squares
            alone; else the largest error too.
    """
    sizes = {"rms": lambda t: t.square().mean().sqrt()} | ({} if ties else {"largest": lambda t: t.abs().amax()})

    def check(got: object) -> None:
        results = [list(tensors_of(value)) for value in (got, plain, exact)]
        if len({len(tensors) for tensors in results}) != 1:
            raise WrongAnswerError(f"{len(results[0])} results instead of {len(results[2])}")
        for i, (value, ours, truth) in enumerate(zip(*results, strict=True)):
            if value.shape != truth.shape:
                raise WrongAnswerError(f"result {i}: {list(value.shape)} instead of {list(truth.shape)}")
            if not value.isfinite().all():
                raise WrongAnswerError(f"result {i}: a value is not finite")
            for name, size in sizes.items():
                error, allowed = (size(x.double() - truth) for x in (value, ours))
                limit = 2 * (allowed + torch.finfo(value.dtype).eps * size(truth.double()))
                if error > limit:
                    raise WrongAnswerError(
                        f"result {i}: {name} error {error:.3e}, the reference's {allowed:.3e}, limit {limit:.3e}"
                    )

    return check


@contextmanager
def optional(name: str) -> Iterator[None]:
    """What a peer lacks, or cannot do, or gets wrong, is the reason why it is not measured."""
    try:
        yield
    except (ImportError, WrongAnswerError, torch.OutOfMemoryError, NotImplementedError) as error:
        pytest.skip(f"{NOT_MEASURED}{name}: {' '.join(str(error).split())[:300]}")
