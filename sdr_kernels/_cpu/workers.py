"""Threads that each run torch's ops alone: pieces of work side by side, with no wait at the end of every op.

An op of torch that runs on all cores ends with its threads waiting for each other, which costs more than the work of a
small op, and many times that where another process keeps one of them from running.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = _start(threads)
        return _pools[threads]


def _start(threads: int) -> ThreadPoolExecutor:
    """A thread of the user's that first meets torch meanwhile runs its ops alone, too: torch has no other way."""
    pool, all_here = ThreadPoolExecutor(threads, thread_name_prefix="sdr"), Barrier(threads)

    def run_ops_alone(_: int) -> None:
        torch.get_num_threads()  # or the first op would set this thread's number again
        torch.set_num_threads(1)  # of this thread, and of those that start later
        all_here.wait()

    try:
        list(pool.map(run_ops_alone, range(threads)))
    except BaseException:  # a thread could not start: the others must not wait for it for ever
        all_here.abort()
        pool.shutdown()
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def _forget() -> None:
    global _lock
    _pools.clear()
    _lock = Lock()


os.register_at_fork(after_in_child=_forget)  # a child has none of the threads


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], *, even_one: bool = False) -> list[Result]:
    """``function`` of every item, in order, on as many threads as torch uses for an op; no gradients, no autocast.

    A single item stays with the caller, whose ops run on all threads, unless ``even_one``.
    """
    inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(item)

    threads = torch.get_num_threads()
    if threads == 1 or (len(items) == 1 and not even_one):
        return [run(item) for item in items]
    futures = _submit(threads, run, items)
    try:
        return [future.result() for future in futures] + [run(item) for item in items[len(futures) :]]
    finally:
        for future in futures:
            future.cancel()  # those behind an error


def _submit(threads: int, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
    """Fewer than items where no thread can start, or none takes work any more, since the main thread has ended."""
    futures = []
    try:
        pool = _pool(threads)
        for item in items:
            futures.append(pool.submit(function, item))
    except RuntimeError as error:  # only of the pool: what function raises is in its future
        logger.info(
            "%d of %d pieces of work run on the caller's thread: %s", len(items) - len(futures), len(items), error
        )
    return futures
