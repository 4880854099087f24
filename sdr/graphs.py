"""CUDA graphs of one function, one per input shape: a small model's launches cost more than its kernels."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_GRAPHS = 8  # each holds the memory of one pass
_one_capture = threading.Lock()  # a capture begins with work that disturbs another's on the device


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    outputs: tuple[Tensor, ...]


class GraphCache:
    """Captures a function at its first call with a shape and replays it at every later one.

    Any thread may call from any stream of the device: replays share memory, so the host takes turns by a lock and the
    device by an event. Results are copies that later calls do not touch.

    Args:
        function: of one CUDA tensor to a tuple of tensors; launches the same work for the same shape, and never asks
            the device for a value.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()  # least recently used first
        self._done: torch.cuda.Event | None = None
        self._pool = self._stream = None  # of all captures; replays take turns, so they may share memory

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """``function(x)``, replayed."""
        key = (x.shape, x.dtype, x.stride())
        with self._lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            if key not in self._graphs:
                self._capture(key, x)
            self._graphs.move_to_end(key)
            graph, static, outputs = self._graphs[key]
            static.copy_(x)
            try:
                graph.replay()
                return tuple(output.clone() for output in outputs)
            finally:  # the next call waits for the replay even where there was no memory for the copies
                self._done = stream.record_event()

    def _capture(self, key: tuple, x: Tensor) -> None:
        if len(self._graphs) == MAX_GRAPHS:
            self.synchronize()
            self._graphs.popitem(last=False)
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        static = torch.empty_like(x).copy_(x)  # dense, whatever x is
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.function(static)  # kernels are compiled and loaded before the capture, which forbids both
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on their streams does not end this capture
        with (
            _one_capture,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = self.function(static)
        self._graphs[key] = _Graph(graph, static, outputs)

    def synchronize(self) -> None:
        """Wait for the last replay; before graphs are freed, since their memory may be handed out again at once."""
        if self._done is not None:
            self._done.synchronize()
