"""Memory between pages that may not be touched: one access outside of a tensor ends the process, which is another one.

Triton's interpreter and the CPU's own ops read and write through bare pointers, so what they do outside of a tensor is
seen by the machine itself, where the tensor lies flush against such a page.
"""

import ctypes
import faulthandler
import json
import mmap
import os
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
UNTOUCHED = 0xFF  # of every byte beside a tensor in its pages; NaN as a float
MAX_FAILURES = 5  # of a run apart; the rest of its cases then stay undone

_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """Whole pages between two that may not be touched."""

    def __init__(self, pages: int) -> None:
        self._memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for guard in (start, start + (pages + 1) * PAGE):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = np.frombuffer(self._memory, np.uint8)[PAGE : (pages + 1) * PAGE]
        self.first = 0
        self.count = 0

    def tensor(self, count: int, dtype: torch.dtype, *, at_end: bool) -> Tensor:
        """[count], flush against the page behind it or before it; every byte is 255."""
        self.bytes.fill(UNTOUCHED)
        self.count = count * dtype.itemsize
        self.first = len(self.bytes) - self.count if at_end else 0
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=PAGE + self.first)

    def beside_is_untouched(self) -> bool:
        beside = self.bytes[: self.first], self.bytes[self.first + self.count :]
        return all((part == UNTOUCHED).all() for part in beside)


class Arena:
    """Gives out places and takes them all back at once."""

    def __init__(self) -> None:
        self._free: dict[int, list[Place]] = {}
        self.used: list[tuple[int, Place]] = []

    def tensor(self, count: int, dtype: torch.dtype, *, at_end: bool) -> Tensor:
        """[count], at least one; its content is given up by ``release``."""
        pages = -(-count * dtype.itemsize // PAGE)
        free = self._free.setdefault(pages, [])
        place = free.pop() if free else Place(pages)
        self.used.append((pages, place))
        return place.tensor(count, dtype, at_end=at_end)

    def release(self) -> None:
        """Raise AssertionError where something beside a tensor was written."""
        used, self.used = self.used, []
        for pages, place in used:
            self._free[pages].append(place)
        assert all(place.beside_is_untouched() for _, place in used), "memory beside a tensor was written"


def span(x: Tensor) -> int:
    """Elements from the first of x to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def spread(x: Tensor) -> Tensor:
    """[span] of x's own memory, gaps included; of bool the bytes, which copies would make 0 or 1."""
    x = x.detach()
    return (x.view(torch.uint8) if x.dtype == torch.bool else x).as_strided((span(x),), (1,))


def gaps_equal(x: Tensor, y: Tensor) -> bool:
    """Whether what lies between the elements of two tensors of the same strides is the same, bit for bit."""
    if span(x) == x.numel():
        return True
    gaps = torch.ones(span(x), dtype=torch.bool)
    gaps.as_strided(x.shape, x.stride()).fill_(False)
    return same_bits(spread(x)[gaps], spread(y)[gaps])


@contextmanager
def launches_guarded(at_end: Callable[[], bool]) -> Iterator[None]:
    """Within the block every tensor that an interpreted kernel gets lies between guards while the kernel runs.

    Inputs, results, scratch memory and copies alike, whoever allocated them.

    Args:
        at_end: asked for each tensor: whether its end or its start is flush.
    """
    from triton.runtime.interpreter import GridExecutor

    run, arena = GridExecutor.__call__, Arena()

    def move(x: object) -> object:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        moved = arena.tensor(span(x), x.dtype, at_end=at_end()).as_strided(x.shape, x.stride())
        spread(moved).copy_(spread(x))
        return moved

    def run_guarded(self, *args, **kwargs):
        moved = [move(x) for x in args]
        run(self, *moved, **kwargs)
        for x, copy in zip(args, moved, strict=True):
            if copy is x:
                continue
            assert gaps_equal(x, copy), "memory between a tensor's elements was written"
            if not same_bits(x, copy):
                x.detach().copy_(copy)
        arena.release()

    GridExecutor.__call__ = run_guarded
    try:
        yield
    finally:
        GridExecutor.__call__ = run


@contextmanager
def allocations_guarded(at_end: Callable[[], bool]) -> Iterator[None]:
    """Within the block what ``Tensor.new_empty`` gives, as to the CPU's own implementations, lies between guards."""
    plain, arena = torch.Tensor.new_empty, Arena()

    def new_empty(self, *size, **options):
        like = plain(self, *size, **options)
        if like.numel() == 0:
            return like
        return arena.tensor(like.numel(), like.dtype, at_end=at_end()).view(like.shape)

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = plain
        arena.release()


def same_bits(x: Tensor, y: Tensor) -> bool:
    """NaN equals itself, and 0 is not -0."""
    bits = [np.ascontiguousarray(t.detach().numpy()).tobytes() for t in (x, y)]
    return bits[0] == bits[1]


def run_apart(
    check: Callable[[int], Iterable[str] | None], numbers: Iterator[int]
) -> tuple[int, dict[int, str], Counter[str]]:
    """``check`` of every number in processes apart, a new one after each crash.

    Returns:
        How many were done, what failed: number to the error, or to the signal that ended the process; and how often
        each word was what ``check`` returned.
    """
    waiting, failed, done, said = list(numbers), {}, 0, Counter()
    while waiting and len(failed) < MAX_FAILURES:
        with tempfile.TemporaryFile("w+") as crash:
            reports, code = _forked(check, waiting, crash)
            crash.seek(0)
            where = crash.read()
        for number, problem, words in reports:
            said.update(words)
            if problem:
                failed[number] = problem
        done += len(reports)
        waiting = waiting[len(reports) :]
        if waiting and code:
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            failed[waiting.pop(0)] = f"{end}\n{where}"
            done += 1
    return done, failed, said


def _forked(check: Callable, numbers: list[int], crash) -> tuple[list[tuple[int, str, list[str]]], int]:
    """What a child reported of each number, until it ended or enough had failed, and its exit code."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of threads that this child never meets
        child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            faulthandler.enable(crash)
            with os.fdopen(writable, "w") as reports:
                _report(check, numbers, reports)
            os._exit(0)
        finally:
            traceback.print_exc(file=crash)
            crash.flush()
            os._exit(3)
    os.close(writable)
    with os.fdopen(readable) as lines:
        reports = [tuple(json.loads(line)) for line in lines]
    return reports, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _report(check: Callable, numbers: list[int], reports) -> None:
    failures = 0
    for number in numbers:
        problem, words = "", []
        try:
            words = sorted(check(number) or ())
        except Exception as error:  # of any kind: the case has failed, and its error says why
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"
            failures += 1
        reports.write(json.dumps([number, problem, words]) + "\n")
        reports.flush()
        if failures == MAX_FAILURES:
            return
