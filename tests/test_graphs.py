"""GraphCache: on a GPU for real, and its bookkeeping anywhere against a stand-in for CUDA."""

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sdr import graphs
from sdr.graphs import MAX_GRAPHS, GraphCache

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA whose graphs re-run what was captured, in place, and that writes down what it was asked."""
    log = []

    class Stream:
        def wait_event(self, event):
            log.append(("wait", event))

        def wait_stream(self, stream):
            pass

        def record_event(self):
            return SimpleNamespace(synchronize=lambda: log.append("synchronize"))

    class Graph:
        def replay(self):
            log.append("replay")
            self.run()

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pool == "pool"
        assert capture_error_mode == "thread_local"
        log.append("capture")
        yield

    main = Stream()
    for name, value in {
        "device": lambda device: nullcontext(),
        "current_stream": lambda: main,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "graph": capture,
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)
    return log


class Doubler:
    """Writes into the tensors of its first call with a static input, as a replayed graph does."""

    def __init__(self, cache):
        self.cache = cache

    def __call__(self, x):
        out = x * 2
        self.last = x, out
        return (out,)


def make_cache(log):
    function = Doubler(None)
    cache = GraphCache(function)
    plain = cache._capture

    def capture(key, x):
        plain(key, x)
        static, out = function.last
        cache._graphs[key].graph.run = lambda: out.copy_(static * 2)

    cache._capture = capture
    return cache


def test_a_shape_is_captured_once_and_replayed(cuda):
    cache = make_cache(cuda)
    for value in (1.0, 2.0, 3.0):
        (out,) = cache(torch.full((2, 3), value))
        assert out.tolist() == [[2 * value] * 3] * 2
    assert cuda.count("capture") == 1
    assert cuda.count("replay") == 3


def test_results_are_copies(cuda):
    cache = make_cache(cuda)
    (first,) = cache(torch.ones(2))
    (second,) = cache(torch.full((2,), 5.0))
    assert first.tolist() == [2, 2]
    assert second.tolist() == [10, 10]


def test_every_call_waits_for_the_one_before(cuda):
    cache = make_cache(cuda)
    for _ in range(3):
        cache(torch.ones(2))
    assert len([entry for entry in cuda if isinstance(entry, tuple)]) == 2


def test_shape_dtype_and_strides_tell_graphs_apart(cuda):
    cache = make_cache(cuda)
    x = torch.ones(2, 3)
    for view in (x, x.half(), x.T, x.T.contiguous(), x[:1]):
        assert torch.equal(cache(view)[0], view * 2)
    assert cuda.count("capture") == 5


def test_the_least_used_graph_goes_after_its_work_is_done(cuda):
    cache = make_cache(cuda)
    for n in (*range(1, MAX_GRAPHS + 1), 1):
        cache(torch.ones(n))
    assert "synchronize" not in cuda
    cache(torch.ones(MAX_GRAPHS + 1))
    assert cuda.count("synchronize") == 1
    assert [key[0][0] for key in cache._graphs] == [*range(3, MAX_GRAPHS + 1), 1, MAX_GRAPHS + 1]  # 2 is gone


def test_an_expanded_input_is_captured_dense(cuda):
    cache = make_cache(cuda)
    x = torch.ones(2, 1).expand(2, 3)
    assert cache(x)[0].tolist() == [[2] * 3] * 2
    assert [graph.x.stride() for graph in cache._graphs.values()] == [(3, 1)]


def test_the_next_call_waits_even_where_copies_failed(cuda, monkeypatch):
    cache = make_cache(cuda)
    cache(torch.ones(2))
    before = cache._done
    (graph,) = cache._graphs.values()
    cache._graphs[next(iter(cache._graphs))] = graph._replace(outputs=(None,))
    with pytest.raises(AttributeError):
        cache(torch.ones(2))
    assert cache._done is not before


@needs_gpu
def test_replays_follow_their_input():
    cache = GraphCache(lambda x: (x.square(), x.sum(0)))
    for _ in range(100):
        x = torch.randn(64, 64, device="cuda")
        square, total = cache(x)
        assert torch.equal(square, x.square())
        assert torch.equal(total, x.sum(0))


@needs_gpu
def test_streams_and_threads_share_graphs():
    cache = GraphCache(lambda x: (x @ x,))
    inputs = [torch.randn(256 + 64 * (i % 3), 256 + 64 * (i % 3), device="cuda") for i in range(8)]
    expected = [x @ x for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [cache(inputs[i])[0] for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for result in results if not torch.equal(result, expected[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
