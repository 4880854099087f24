"""What every op promises on a GPU: repeats, CUDA graphs, streams, threads, no waiting, tensors beyond 2^31 elements.

Without a GPU the same code runs on interpreted kernels with few repeats and a small bound in place of 2^31, so that it
is known to run; graphs and streams are stood in for.
"""

import fcntl
import math
import mmap
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import widened
from odd_tensors import MAKERS, OF_THE_CPU, Case, Usual
from test_fuzz_ops import copied, result_shape, results
from torch import Tensor

import sdr_kernels
from sdr_kernels._cuda.loader import why_not_cuda
from sdr_kernels._triton import info_nce as kernels
from sdr_kernels.info_nce import normalise

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
REPEATS = 250 if GPU else 2
REPEATS_OF_THE_CPU = 50
REHEARSED = ("spatial_mean", "info_nce")  # what does not depend on the op, without a GPU
REPLAYS = 100 if GPU else 2
THREADS = 8 if GPU else 2
CLIPS = 64 if GPU else 2
CLIPS_OF_THE_LOSS = 16 if GPU else 2  # 64 rows of features fit one program
ELEMENTS = 4096 if GPU else 32  # of a step, at least
LOSSES = ("info_nce", "leave_one_out_kl", "sdr_loss")
DIFFERENTIABLE = (*LOSSES, "temporal_conv3d", "normed_stem", "normed_bottleneck")
LIMIT = 2**31 if GPU else 2**8  # elements
BUSY_CYCLES = 2_000_000_000  # of the default stream: a second or more
MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
DTYPE = torch.bfloat16 if GPU else torch.float32
CUDA = ("temporal_conv3d", "sdr_loss")
RUNS = [(op, "triton") for op in MAKERS]
if GPU and not why_not_cuda(DEVICE):
    RUNS += [(op, "cuda") for op in CUDA]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy


def on_a_gpu(mark: pytest.MarkDecorator) -> Callable[[Callable], Callable]:
    """The mark where there is a GPU: elsewhere a test is a rehearsal, which holds no promise."""
    return mark if GPU else lambda test: test


class Step:
    """A call of an op and its gradients, always on the same tensors: the first drawn that is large enough."""

    def __init__(self, op: str, impl: str, dtype: torch.dtype = DTYPE) -> None:
        for number in range(2000):
            odd = Usual(number, dtype, DEVICE, clips=CLIPS_OF_THE_LOSS if op == "sdr_loss" else CLIPS)
            self.case: Case = MAKERS[op](odd, impl)
            if min(odd.drawn.values()) > 1 and self.is_large(op):  # an axis of one would hide a wrong stride
                break
        else:
            raise AssertionError(f"no call of {op} is large enough")
        with torch.no_grad():
            out = as_tuple(self.case.function(*self.case.inputs))[0]
        self.dout = torch.randn(out.shape, device=DEVICE).to(out.dtype)

    def is_large(self, op: str) -> bool:
        """Of a loss, a few numbers, and of a stem, a pixel or two, the largest input counts."""
        given = [x for x in self.case.inputs if isinstance(x, Tensor)]
        if op.split()[0] in DIFFERENTIABLE and not any(x.requires_grad for x in given):
            return False
        size = max(x.numel() for x in given) if op in (*LOSSES, "normed_stem") else math.prod(result_shape(self.case))
        return size >= ELEMENTS

    def __call__(self) -> list[Tensor]:
        return results(self.case.function, self.case.inputs, self.dout)

    def on_copies(self) -> list[Tensor]:
        """The same on leaves of its own: autograd remembers the stream that a leaf was first used on."""
        inputs = [copied(x) if isinstance(x, Tensor) else x for x in self.case.inputs]
        return results(self.case.function, inputs, self.dout)


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@pytest.fixture(params=RUNS if GPU else [(op, "triton") for op in REHEARSED], ids=lambda run: f"{run[0]}-{run[1]}")
def step(request):
    return Step(*request.param)


@on_a_gpu(pytest.mark.promise(row="repeatable"))
@pytest.mark.parametrize(("op", "impl"), RUNS)
def test_repeats_are_bit_equal(op, impl):
    step = Step(op, impl)
    first = step()
    assert all(equal(first, step()) for _ in range(REPEATS - 1))


@pytest.mark.promise(row="repeatable")
@pytest.mark.skipif(GPU, reason="the CPU's own implementations take CPU tensors")
@pytest.mark.parametrize("op", OF_THE_CPU)
def test_repeats_on_a_cpu_are_bit_equal(op):
    step = Step(op, "cpu")
    first = step()
    assert all(equal(first, step()) for _ in range(REPEATS_OF_THE_CPU - 1))


def captured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """The results of a run, and what fills them again by replaying its graph; by running it again on a CPU."""
    if not GPU:
        found = run()
        return found, lambda: [x.detach().copy_(y) for x, y in zip(found, run(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return found, graph.replay


@on_a_gpu(pytest.mark.promise(row="well behaved"))
def test_a_graph_replays_what_it_captured(step):
    expected = step()
    found, replay = captured(lambda: [x.clone() for x in step()])  # a gradient may be what came in, which stays
    for _ in range(REPLAYS):
        for x in found:
            x.detach().zero_()
        replay()
        assert equal(expected, found)


@on_a_gpu(pytest.mark.promise(row="well behaved"))
def test_a_stream_of_its_own_does_not_wait_for_the_default_one(step):
    expected = step()
    if not GPU:
        assert equal(expected, step())
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # memory of this stream, so that none is asked of the driver, which would wait
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    with torch.cuda.stream(side):
        found = step()
        side.synchronize()
    busy = not torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    assert busy, "the kernels waited for the default stream, or ran on it"
    assert equal(expected, found)


def runs_on_threads(step: Step, count: int) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[] for _ in range(count)]

    def run(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if GPU else nullcontext():
            found[i] = step.on_copies()
            if GPU:
                torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@on_a_gpu(pytest.mark.promise(row="well behaved"))
@pytest.mark.parametrize(("op", "impl"), RUNS if GPU else [(op, "cpu") for op in OF_THE_CPU])
def test_threads_get_what_one_gets(op, impl):
    """The interpreter is no thread's own, so without a GPU the CPU's implementations are run."""
    step = Step(op, impl)
    expected = step()
    if GPU:
        torch.cuda.synchronize()
    assert all(equal(expected, found) for found in runs_on_threads(step, THREADS))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block a call that would wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode() if GPU else 0
    try:
        if GPU:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode")  # it says once that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode(before)


@on_a_gpu(pytest.mark.promise(row="well behaved"))
def test_no_step_waits_for_the_device(step):
    step()
    with no_waiting():
        step()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of all processes: each holds tens of GB."""
    with (Path(tempfile.gettempdir()) / f"sdr_large_{DEVICE.type}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if GPU:
                torch.cuda.empty_cache()


# the ops whose result of a clip depends on that clip alone, and which of their inputs hold clips
BY_CLIP = {
    "temporal_conv3d": (0, 4),
    "temporal_stem": (0,),
    "temporal_bottleneck": (0,),
    "bottleneck_chain": (0,),
    "spatial_mean": (0,),
    "norm_linear": (0, 5),
    "token_attention": (0,),
    "clip_views": (0, 1, 2, 3),
}


def grown(x: Tensor, count: int) -> Tensor:
    """count clips in x's order of memory: zeros, and x at the end."""
    order = sorted(range(1, x.ndim), key=lambda axis: -x.stride(axis))
    shape = count, *(x.shape[axis] for axis in order)
    memory = x.new_zeros(shape) if GPU else untouched(math.prod(shape), x.dtype).view(shape)
    whole = memory.permute(0, *(order.index(axis) + 1 for axis in range(1, x.ndim)))
    whole[-len(x) :] = x.detach()
    return whole


def usual_with_clips(op: str, dtype: torch.dtype, wanted: tuple[int, ...]) -> tuple[Case, int]:
    """The first call drawn that is large enough for few clips to pass the limit, and has gradients where it may.

    With the elements of a clip, or of its result where these are fewer; they are within 4 times of each other (2, where
    gradients have their sizes too), so that both pass the limit and fit in 80 GB.
    """
    for number in range(2000):
        case = MAKERS[op](Usual(number, dtype, DEVICE, clips=1), "triton")
        first = case.inputs[wanted[0]]
        gradients = any(isinstance(x, Tensor) and x.requires_grad for x in case.inputs)
        # programs of norm_linear's last rows are neighbours where they have all columns
        fit = gradients if op == "temporal_conv3d" else op != "norm_linear" or case.inputs[1].shape[0] <= 16
        if fit and first.shape[0] == 1 and first.numel() >= 32:
            sizes = sorted((first.numel(), math.prod(result_shape(case))))
            if sizes[1] <= sizes[0] * (2 if gradients else 4):
                return case, sizes[0]
    raise AssertionError(f"no call of {op} is large enough")


@on_a_gpu(pytest.mark.promise(row="large"))
@pytest.mark.parametrize("op", BY_CLIP)
def test_the_far_end_of_a_tensor_beyond_2_31_elements(op):
    """Zeros up to the last clip, whose result and gradients are those of the clip alone."""
    wanted = BY_CLIP[op]
    case, clip = usual_with_clips(op, DTYPE, wanted)
    count = LIMIT // clip + 2
    with one_at_a_time():
        inputs = list(case.inputs)
        for i in wanted:
            if inputs[i] is not None:
                inputs[i] = grown(inputs[i], count).requires_grad_(inputs[i].requires_grad)
        out = case.function(*inputs)
        assert min(out.numel(), inputs[wanted[0]].numel()) > LIMIT
        exact = case.reference(*widened(case.inputs))
        plain = case.reference(*case.inputs)
        assert_close(out[-1:].detach(), plain.detach(), exact.detach())
        leaves = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        if not leaves:
            return
        dout = torch.randn(exact.shape, device=DEVICE).to(out.dtype)
        found = torch.autograd.grad(out, [inputs[i] for i in leaves], grown(dout, count))
        wide = widened(case.inputs)
        truth = torch.autograd.grad(case.reference(*wide), [wide[i] for i in leaves], dout.double())
        ours = torch.autograd.grad(plain, [case.inputs[i] for i in leaves], dout)
        for i, values in zip(leaves, zip(found, ours, truth, strict=True), strict=True):
            value, *others = values
            assert_close(value[-1:] if i in wanted else value, *others)


def untouched(count: int, dtype: torch.dtype) -> Tensor:
    """[count] zeros, of which only the pages that are touched are ever there."""
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)


@contextmanager
def last_programs(monkeypatch, count: int) -> Iterator[None]:
    """Within the block interpreted launches run their last programs alone, and large results are never touched.

    Kernels must have been interpreted before: with the first launch a module keeps the interpreter's names for good.
    """
    from triton.runtime import interpreter

    def new_empty(self, *size, dtype=None, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return untouched(max(math.prod(shape), 1), dtype or self.dtype)[: math.prod(shape)].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "range", lambda n, *rest: range(n, *rest)[-count:], raising=False)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # would copy all to itself
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield


@pytest.mark.promise(row="large")
@pytest.mark.skipif(GPU, reason="a GPU has a test with all programs")
@pytest.mark.parametrize("op", [op for op in BY_CLIP if op != "bottleneck_chain"])  # on a GPU it is the bottleneck
def test_the_last_programs_reach_beyond_2_31_elements(op, monkeypatch):
    """Offsets of interpreted kernels wrap as a GPU's would; whole clips of zeros are memory that nobody touches."""
    wanted = BY_CLIP[op]
    case, clip = usual_with_clips(op, torch.float16, wanted)
    small = [x.detach() if isinstance(x, Tensor) else x for x in case.inputs]
    count = 2**31 // clip + 2
    inputs = [grown(x, count) if i in wanted and x is not None else x for i, x in enumerate(small)]
    assert inputs[wanted[0]].numel() > 2**31
    exact, plain = case.reference(*widened(small)), case.reference(*small)
    case.function(*small)
    with last_programs(monkeypatch, 16):
        out = case.function(*inputs)
    assert out.numel() > 2**31
    error, of_plain = ((x[-1:].double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * of_plain + 8 * torch.finfo(torch.float16).eps * exact.abs().max()
    assert exact.any()


def assert_close(value: Tensor, plain: Tensor, truth: Tensor) -> None:
    error, of_plain = ((x.double() - truth).abs().max() for x in (value, plain))
    assert error <= 2 * of_plain + 8 * torch.finfo(DTYPE).eps * truth.abs().max()


@on_a_gpu(pytest.mark.promise(row="large"))
@pytest.mark.parametrize("bn", ["frozen", "batch"])
@pytest.mark.parametrize("op", ["normed_stem", "normed_bottleneck gram", *["normed_bottleneck fused"] * GPU])
def test_training_beyond_2_31_elements(op, bn):
    """Frozen norms: zeros up to the last clip. The batch's: one clip again and again, whose statistics are its own.

    Gradients are held against those of the clip alone, which have tests of their own. A stem's result, a sixteenth of
    what it reads for each channel, stays below 2^31: 80 GB do not hold a larger one.
    """
    number = next(n for n in range(4000) if fits(MAKERS[op](Usual(n, DTYPE, DEVICE, clips=1), "triton"), bn))
    case = MAKERS[op](Usual(number, DTYPE, DEVICE, clips=1), "triton")
    x = case.inputs[0]
    count = LIMIT // x.numel() + 2
    with one_at_a_time():
        large = whole_batch(x.detach(), count, bn).requires_grad_(x.requires_grad)
        out, *statistics = as_tuple(case.function(large, *case.inputs[1:]))
        assert op == "normed_stem" or out.numel() > LIMIT
        exact, *truth = as_tuple(case.reference(*widened(case.inputs)))
        assert_near(out[-1:], exact)
        for value, expected in zip(statistics, truth, strict=True):
            assert_near(value, expected)
        dout = torch.randn(exact.shape, device=DEVICE).to(out.dtype)
        leaves = [t for t in case.inputs[1:] if t.requires_grad]
        alone = as_tuple(case.function(*case.inputs))[0]
        wide = torch.autograd.grad(out, [*[large] * x.requires_grad, *leaves], whole_batch(dout, count, bn))
        small = torch.autograd.grad(alone, [*[x] * x.requires_grad, *leaves], dout)
        largest = max(t.abs().max() for t in small)
        for i, (value, expected) in enumerate(zip(wide, small, strict=True)):
            own = i == 0 and x.requires_grad
            value = value[-1:] if own else value.double() / (1 if bn == "frozen" else count)
            assert (value - expected).abs().max() <= 0.05 * expected.abs().max() + 0.01 * largest


def whole_batch(x: Tensor, count: int, bn: str) -> Tensor:
    return grown(x, count) if bn == "frozen" else x.expand(count, *x.shape[1:]).contiguous()


def as_tuple(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def fits(case: Case, bn: str) -> bool:
    """Norms of this kind, and no layer wider than x: about 40 GB where x has 2^31 elements of 2 bytes."""
    x, weights = case.inputs[0], [t for t in case.inputs[1:] if t.ndim == 4]
    if x.ndim != 6 or x.numel() < 64 or (case.norms > 0) != (bn == "batch"):
        return False
    if len(weights) == 1:  # a stem
        return weights[0].shape[1] <= x.shape[2]
    narrow = 2 * weights[0].shape[1] <= x.shape[2]
    return narrow and x.requires_grad and result_shape(case) == list(x.shape)


def assert_near(value: Tensor, truth: Tensor) -> None:
    assert (value.double() - truth).abs().max() <= 0.05 * truth.abs().max() + 16 * torch.finfo(DTYPE).eps


@on_a_gpu(pytest.mark.promise(row="large"))
def test_info_nce_beyond_2_31_elements():
    """Rows without a direction are similar to none; the last two have one, in their last columns alone.

    A GPU runs no backward pass here: it walks over all rows and columns for each tile of the gradient, 7e16 operations.
    Its last offsets are interpreted below.
    """
    N = 65_536 if GPU else 64
    D, shown = LIMIT // N + 8, 5
    few = torch.randn(2, shown, device=DEVICE).to(DTYPE)
    with one_at_a_time():
        features = torch.zeros(N, D, device=DEVICE, dtype=DTYPE)
        features[-2:, -shown:] = few
        assert features.numel() > LIMIT
        features.requires_grad_(not GPU)
        loss = sdr_kernels.info_nce(features, torch.zeros(N, device=DEVICE, dtype=torch.long), impl="triton")
        leaf = few.double().requires_grad_()
        unit = normalise(leaf)
        near = (unit[0] @ unit[1]) / 0.07
        each = torch.log(near.exp() + N - 2) - near / (N - 1)
        exact = ((N - 2) * torch.log(torch.tensor(N - 1.0, dtype=torch.float64)) + 2 * each) / N
        assert abs(loss.item() - exact.item()) <= 1e-4 * exact.item()
        if GPU:
            return
        (gradient,) = torch.autograd.grad(loss, features)
        (expected,) = torch.autograd.grad(exact, leaf)
        error = (gradient[-2:, -shown:].double() - expected).abs().max()
        assert error <= 0.05 * expected.abs().max()
        assert not gradient[:-2].any()


@pytest.mark.promise(row="large")
@pytest.mark.skipif(GPU, reason="a GPU has no last programs alone")
def test_the_last_program_of_info_nces_backward_reaches_beyond_2_31_elements(monkeypatch):
    """Rows without a direction up to the last five; a program's walk over columns is cut to its end."""
    n, D = 5, 65
    N = 2**31 // D + 2 * n
    few = torch.randn(n, D).half()
    labels = torch.arange(n) % 2
    _, rows = kernels.info_nce_fwd(few, labels, 0.5, False)
    kernels.info_nce_bwd(few, labels, rows, torch.tensor(1.0), 0.5)
    features, terms = untouched(N * D, torch.float16).view(N, D), untouched(4 * N, torch.float64).view(4, N)
    features[-n:], terms[:, -n:] = few, rows
    terms[0, -1024:-n] = torch.inf
    wide_labels = untouched(N, torch.int64)
    wide_labels[-n:] = labels
    monkeypatch.setattr(kernels, "range", lambda *limits: range(*map(int, limits))[-2:], raising=False)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: untouched(x.numel(), x.dtype).view(x.shape))
    with last_programs(monkeypatch, 1):
        found = kernels.info_nce_bwd(features, wide_labels, terms, torch.tensor(1.0), 0.5)
    leaf = few.double().requires_grad_()
    (expected,) = torch.autograd.grad(sdr_kernels.info_nce(leaf, labels, temperature=0.5, impl="reference"), leaf)
    assert (found[-n:].double() - expected).abs().max() <= 0.01 * expected.abs().max()


META = partial(torch.empty, device="meta")


@pytest.mark.promise(row="large")
@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("leave_one_out_kl", (META(2**20, 16), META(2**20, 2**8, 16))),
        ("sdr_loss", (META(1, 64, 2**25), META(1, dtype=torch.long), META(1), META(1, 2), META(1, 64, 2))),
    ],
)
def test_what_one_program_cannot_walk_is_refused_before_the_launch(op, inputs):
    with pytest.raises(
        RuntimeError, match=r"^impl='triton' cannot run: .* must have fewer than 2\^31 elements"
    ) as error:
        getattr(sdr_kernels, op)(*inputs, impl="triton")
    assert "\n" not in str(error.value)


class Function(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case.function

    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return as_tuple(self.function(*inputs))


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("op", MAKERS)
def test_exports(op):
    case = MAKERS[op](Usual(0, DTYPE, DEVICE), "triton")
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in case.inputs)
    exported = torch.export.export(Function(case), inputs, strict=False)
    expected = Function(case)(*inputs)
    assert equal(list(exported.module()(*inputs)), list(expected))


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
@pytest.mark.parametrize("op", ["normed_stem", "bottleneck_chain"])
def test_compiles_whole(op):
    """The other ops have such a test in their own files."""
    case = MAKERS[op](Usual(0, DTYPE, DEVICE), "triton")
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in case.inputs]
    compiled = torch.compile(Function(case), fullgraph=True, backend="aot_eager")
    assert equal(list(compiled(*inputs)), list(Function(case)(*inputs)))
