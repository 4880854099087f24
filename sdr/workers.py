"""Threads that each run torch's ops alone: pieces of a network side by side, with no wait at the end of every op.

An op of torch that runs on all cores ends with its threads waiting for each other, which costs more than the work of a
small op, and many times that where another process keeps one of them from running.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor


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


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``function`` of every input, without gradients, on as many threads as torch uses for an op."""
    threads = torch.get_num_threads()
    if threads == 1 or len(inputs) == 1:
        return [function(x) for x in inputs]
    return list(_pool(threads).map(torch.no_grad()(function), inputs))
