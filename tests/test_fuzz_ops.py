"""Every public op on random odd tensors, between pages that may not be touched, against float64.

``SDR_CASES`` is how many cases each op has in each dtype and implementation.
"""

import ctypes
from contextlib import ExitStack

import draws
import numpy as np
import pytest
import torch
from compare import widened
from guarded import Arena, allocations_guarded, launches_guarded, run_apart, same_bits
from odd_tensors import MAKERS, OF_THE_CPU, Case, Odd, memory_of
from planted_kernels import launch_reaching
from torch import Tensor

from sdr_kernels._tiles import forced_tiles, load_tiles

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are a CPU's; compute-sanitizer watches a GPU"),
    pytest.mark.promise(row="odd inputs"),
    pytest.mark.promise(row="in bounds"),
    pytest.mark.promise(row="accurate"),
]
REACHES = {"read before": (-1, 0), "read behind": (1, 0), "write before": (0, -1), "write behind": (0, 1)}
RUNS = [(op, impl) for op in MAKERS for impl in ("triton", *["cpu"] * (op in OF_THE_CPU))]
RMS = {torch.float32: 1e-6, torch.float16: 4e-4}  # of the error over that of the truth, for normal draws
NEAR_TIE = 1 / 16  # in float16 nearly every case has a value that is 0 before a ReLU, to its rounding
DRAWS = 3  # of the values of a case: a near tie sends a gradient elsewhere by chance, so most of them must be right


class InaccurateError(AssertionError):
    """An error that is larger than it may be."""


def results(function, inputs: list, dout: Tensor) -> list[Tensor]:
    """The result, what comes with it, and the gradient of every input that asks for one."""
    out = function(*inputs)
    out, *others = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return [out, *others]
    if not out.requires_grad:  # a constant, as the loss of no view
        return [out, *others, *map(torch.zeros_like, leaves)]
    return [out.detach(), *others, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def shaken(inputs: list, rng: np.random.Generator) -> list:
    """In float64, every value off by up to half a unit in the last place of its own dtype."""
    moved = []
    for x, wide in zip(inputs, widened(inputs), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            off = torch.from_numpy(rng.uniform(-0.5, 0.5, x.shape)) * torch.finfo(x.dtype).eps
            wide = (wide.detach() * (1 + off)).requires_grad_(x.requires_grad)
        moved.append(wide)
    return moved


def in_units(value: Tensor) -> Tensor:
    return value.double().nan_to_num(1.0, 2.0, 3.0)


def check_values(i: int, value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Shape, dtype, and NaN and infinity where float64 has them.

    The first result has the very ones. Of others, infinities may have become NaN, and a gradient may be finite where
    plain torch multiplies an infinity by 0: nothing that is not finite may spread.
    """
    assert value.shape == truth.shape, f"result {i}: {list(value.shape)} instead of {list(truth.shape)}"
    assert value.dtype == plain.dtype, f"result {i}: {value.dtype} instead of {plain.dtype}"
    finite = truth.isfinite()
    if i == 0:
        moved = in_units(value)[~finite] != in_units(truth)[~finite]
        assert not moved.any(), f"result {i}: NaN or infinity went or moved"
    assert value.isfinite()[finite].all(), f"result {i}: NaN or infinity spread"


def check_accuracy(i: int, value: Tensor, plain: Tensor, truth: Tensor, near: Tensor, eps: float, size: Tensor) -> None:
    """One result against float64.

    Args:
        i: its number.
        value: it.
        plain: plain torch's in the same dtype.
        truth: in float64.
        near: float64 of inputs that rounding cannot tell from the ones that were given.
        eps: of the dtype that it is right to.
        size: of what its units in the last place are.
    """
    finite = truth.isfinite() & plain.isfinite() & near.isfinite()
    if not finite.any():
        return
    truth = truth[finite]
    error, of_plain, of_near = ((x.double()[finite] - truth).abs().max() for x in (value, plain, near))
    limit = 2 * max(of_plain, of_near) + 4 * eps * max(size, torch.finfo(value.dtype).tiny)
    if not error <= limit:
        raise InaccurateError(f"result {i}: error {error:.3e}, plain torch's {of_plain:.3e}, limit {limit:.3e}")


def largest(values: list[Tensor]) -> Tensor:
    """Of all that is finite."""
    return max((x[x.isfinite()].abs().max() for x in values if x.isfinite().any()), default=torch.tensor(0.0))


def run_case(case: Case, dout: Tensor, rng: np.random.Generator, dtype: torch.dtype, guards: ExitStack) -> None:
    # torch's own convolutions may read a little beyond a tensor: they get copies
    before = [copied(x) if isinstance(x, Tensor) else x for x in case.inputs]
    with guards:
        got = results(case.function, case.inputs, dout)
        for x, copy in zip(case.inputs, before, strict=True):
            assert not isinstance(x, Tensor) or same_bits(x, copy), "an input changed"
        given = [memory_of(x) for x in case.inputs if isinstance(x, Tensor) and x.numel()]
        for value in got:
            first, end = memory_of(value) if value.numel() else (0, 0)
            assert all(end <= start or stop <= first for start, stop in given), "a result lies in an input's memory"
        got = [value.clone() for value in got]
    dout = dout.clone()
    plain = results(case.reference, before, dout)
    truth = results(case.reference, widened(before), dout)
    near = results(case.reference, shaken(before, rng), dout)
    if any(beyond_range(*values) for values in zip(plain, truth, strict=True)):
        return
    statistics = case.statistics(truth)
    for i, values in enumerate(zip(got, plain, truth, strict=True)):
        check_values(i, *values)
    if any((var < mean.square() / 100 + 1e-3).any() for mean, var in statistics):
        return  # a channel of nearly one value: its norm makes what rounding left of it large
    # of the NaN, or of the equals, that meet in a pool any may be the one that gets the gradient
    if not truth[0].isfinite().all() or (case.picks and case.kind in ("tiny", "zeros", "constant")):
        got, plain, truth, near = got[:1], plain[:1], truth[:1], near[:1]
    gradients = largest(truth[1 + 2 * len(statistics) :])
    for i, values in enumerate(zip(got, plain, truth, near, strict=True)):
        if 0 < i <= 2 * len(statistics):  # in units of the values that they are of
            mean, var = statistics[(i - 1) // 2]
            size = largest([(mean.square() + var).sqrt() if i % 2 else mean.square() + var])
        else:  # a gradient through a batch norm is what is left of larger ones
            size = gradients if case.norms and i else largest([values[2]])
        eps = torch.finfo(dtype if i else values[0].dtype).eps
        if case.norms and i > 2 * len(statistics) and dtype == torch.float16:
            eps = NEAR_TIE
        check_accuracy(i, *values, eps, size)
    if case.kind == "normal" and truth[0].numel() >= 64:
        size = truth[0].square().mean().sqrt()
        error, of_plain = ((x.double() - truth[0]).square().mean().sqrt() / size for x in (got[0], plain[0]))
        if not error <= max(RMS[dtype], 2 * of_plain):
            raise InaccurateError(f"relative error {error:.2e}, plain torch's {of_plain:.2e}")


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def beyond_range(plain: Tensor, truth: Tensor) -> bool:
    """Of the dtype, for which nothing is promised."""
    finite = truth.isfinite()
    return bool((~plain.isfinite() | (truth.abs() > torch.finfo(plain.dtype).max))[finite].any())


def refuse(case: Case) -> None:
    with pytest.raises((ValueError, TypeError)) as refusal:
        case.function(*case.inputs)
    assert "\n" not in str(refusal.value)


def some_tile(rng: np.random.Generator):
    """Any tile of the class, as a GPU of any kind and a batch of any size would choose it."""
    arch = str(rng.choice(sorted(load_tiles())))

    def choose(shape_class: str, rows: int) -> dict[str, int]:
        tiles = load_tiles()[arch][shape_class]
        tile = tiles[int(rng.integers(len(tiles)))]
        return {name: value for name, value in tile.items() if name != "min_rows"}

    return forced_tiles(choose)


def attempt(op: str, impl: str, dtype: torch.dtype, arena: Arena, number: int, redrawn: int) -> None:
    """One draw of the values of one case."""
    kind = f"{op} {impl} {dtype}"
    sizes, values = draws.draw(kind, number), draws.draw(f"{kind} values {redrawn}", number)
    odd = Odd(sizes, values, dtype, arena)
    case = MAKERS[op](odd, impl)
    if case.refused:
        return refuse(case)
    guarded = launches_guarded if impl == "triton" else allocations_guarded
    with np.errstate(all="ignore"), ExitStack() as guards:
        guards.enter_context(guarded(lambda: bool(values.integers(2))))
        if odd.chance(0.2):
            guards.enter_context(some_tile(sizes))
        dout = odd.tensor(*result_shape(case), plain=True)
        run_case(case, dout, values, dtype, guards.pop_all())
    return None


def check(op: str, impl: str, dtype: torch.dtype, arena: Arena, number: int) -> None:
    problems = []
    for redrawn in range(DRAWS):
        try:
            return attempt(op, impl, dtype, arena, number, redrawn)
        except InaccurateError as error:
            problems.append(str(error))
            if len(problems) > DRAWS // 2:
                raise InaccurateError("; ".join(problems)) from None
        finally:
            arena.release()
    return None


def result_shape(case: Case) -> list[int]:
    """Of the result."""
    with torch.no_grad():
        out = case.reference(*widened(case.inputs))
    return list((out[0] if isinstance(out, tuple) else out).shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "impl"), RUNS)
def test_odd_tensors(op, impl, dtype, record_property):
    arena = Arena()
    done, failed = run_apart(lambda number: check(op, impl, dtype, arena, number), draws.numbers(draws.CASES))
    record_property("random calls", done)
    test = f"'tests/test_fuzz_ops.py::test_odd_tensors[{op}-{impl}-{dtype}]'"
    problems = [f"{draws.replay(test, number)}\n{problem}" for number, problem in failed.items()]
    assert not problems, "\n".join(problems)


def reach(name: str, *, at_end: bool) -> dict[int, str]:
    """What a planted kernel that copies five of eight lanes ends with; it goes one element too far."""

    def run(_: int) -> None:
        x = torch.arange(5.0)
        with launches_guarded(lambda: at_end):
            out = launch_reaching(x, *REACHES.get(name, (0, 0)))
        assert torch.equal(out, x)

    return run_apart(run, iter([0]))[1]


@pytest.mark.parametrize("name", REACHES)
def test_one_element_too_far_is_caught(name):
    assert "SIGSEGV" in reach(name, at_end="behind" in name)[0]
    if "write" in name:  # on the side without a page
        assert "beside a tensor was written" in reach(name, at_end="before" in name)[0]


@pytest.mark.parametrize("at_end", [True, False])
def test_masked_lanes_are_not_touched(at_end):
    assert reach("", at_end=at_end) == {}


def test_a_crash_is_one_failed_case():
    def run(number: int) -> None:
        if number == 2:
            reached = Arena().tensor(3, torch.float32, at_end=True)
            np.ctypeslib.as_array(ctypes.cast(reached.data_ptr(), ctypes.POINTER(ctypes.c_float)), (4,))[3] = 1
        assert number != 3, "a wrong result"

    done, failed = run_apart(run, iter(range(5)))
    assert done == 5
    assert sorted(failed) == [2, 3]
    assert failed[2].startswith("SIGSEGV")
    assert "a wrong result" in failed[3]
