"""Threads that each run torch's ops alone: pieces of work side by side, with no wait at the end of every op.

An op of torch that runs on all cores ends with its threads waiting for each other, which costs more than the work of a
small op, and many times that where another process keeps one of them from running.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool, all_here = ThreadPoolExecutor(threads, thread_name_prefix="sdr"), Barrier(threads)

    def run_ops_alone(_: int) -> None:
        torch.get_num_threads()  # or the first op would set this thread's number again
        torch.set_num_threads(1)  # of this thread, and of those that start later
        all_here.wait()

    list(pool.map(run_ops_alone, range(threads)))
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``function`` of every item, in order, without gradients, on as many threads as torch uses for an op."""
    inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [run(item) for item in items]
    return list(_pool(threads).map(run, items))
