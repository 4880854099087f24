"""Every public op on random odd tensors, between pages that may not be touched, against float64.

``SDR_CASES`` is how many cases each op has in each dtype and implementation.
"""

import ctypes
import inspect
import re
import sys
from collections import Counter
from contextlib import ExitStack
from typing import NamedTuple

import draws
import numpy as np
import pytest
import torch
from compare import widened
from guarded import Arena, allocations_guarded, launches_guarded, run_apart, same_bits, spread
from odd_tensors import MAKERS, OF_THE_CPU, Case, Odd, memory_of
from planted_kernels import _reaching_kernel, launch_reaching
from torch import Tensor

import sdr_kernels
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
TIES = 0.02  # of a gradient's elements: in float16 nearly every case has a value that is 0 before a ReLU, or nearly
FLAT = {torch.float32: (1e-4, 1e-5), torch.float16: (1e-3, 1e-3)}  # variance over squared mean, and more, of one value
COSINE = 0.9
SMALL = 0.05  # of the largest gradient: what is less may be rounding alone
FULL = "calls compared in full"
ENOUGH = 20  # calls, to say how many of them are compared in full
REFUSED = "calls refused"
NOT_FINITE = "calls with a result that is not finite"
AGAIN = "calls drawn again"
ROUNDING = "calls that the inputs' rounding decided"
DRAWS = 9  # of a case's values in which a result is compared: by luck plain torch errs less in one, a near tie more
ATTEMPTS = 5 * DRAWS  # some draws leave no more than statistics to compare


class Outcome(NamedTuple):
    """How the results of one draw of values were compared.

    Attributes:
        words: of what there was.
        compared: names of the results that were.
        wrong: the name of each that errs more than it may, to what is said of it.
    """

    words: set[str]
    compared: set[str]
    wrong: dict[str, list[str]]


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


def check_values(case: Case, i: int, value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Shape, dtype, and NaN and infinity where float64 has them.

    The first result has the very ones. A statistic may have NaN for an infinity; a gradient may be finite where plain
    torch multiplies an infinity by 0. Nothing that is not finite may spread, and what both call NaN may not be lost.
    """
    assert value.shape == truth.shape, f"result {i}: {list(value.shape)} instead of {list(truth.shape)}"
    assert value.dtype == plain.dtype, f"result {i}: {value.dtype} instead of {plain.dtype}"
    finite = truth.isfinite()
    if i == 0:
        moved = in_units(value)[~finite] != in_units(truth)[~finite]
        assert not moved.any(), f"result {i}: NaN or infinity went or moved"
    lost = value.isfinite()[~finite if i <= 2 * case.norms else truth.isnan() & plain.isnan()]
    # plain torch multiplies what is not finite by the zeros around a clip, and by those that a pool left
    some = case.picks and i > 2 * case.norms
    if not some or (case.norms and lost.numel() == value.numel() > 0):
        assert not (lost.all() if some else lost.any()), f"result {i}: NaN or infinity was lost"
    assert value.isfinite()[finite].all(), f"result {i}: NaN or infinity spread"


class Errors(NamedTuple):
    """Of one result against float64, where all are finite; of the value, of plain torch, and of shaken inputs."""

    truth: Tensor
    of_value: Tensor
    of_plain: Tensor
    of_near: Tensor

    @classmethod
    def make(cls, value: Tensor, plain: Tensor, truth: Tensor, near: Tensor) -> "Errors":
        finite = truth.isfinite() & plain.isfinite() & near.isfinite()
        truth = truth[finite]
        return cls(truth, *((x.double()[finite] - truth).abs() for x in (value, plain, near)))


def check_accuracy(
    name: str, errors: Errors, dtype: torch.dtype, size: Tensor, outcome: Outcome, *, share: float = 0.0
) -> None:
    """At most twice plain torch's error, or that of inputs that rounding cannot tell from the given ones, and 4 ulp.

    Args:
        name: of the result.
        errors: its own.
        dtype: that it is right to.
        size: of what its units in the last place are.
        outcome: gets the name, a word where the inputs' rounding decided, and what is wrong.
        share: of the elements that may err more.
    """
    if errors.truth.numel() == 0:
        return
    outcome.compared.add(name)
    ulps = 4 * torch.finfo(dtype).eps * max(size, torch.finfo(dtype).tiny)
    limit = 2 * errors.of_plain.max() + ulps
    if errors.of_value.max() <= limit:
        return
    outcome.words.add(ROUNDING)
    wrong = errors.of_value > max(limit, 2 * errors.of_near.max() + ulps)
    if wrong.sum() > share * wrong.numel():
        outcome.wrong[name] = [f"error {errors.of_value.max():.3e}, limit {limit:.3e}, {wrong.sum()} wrong"]


def largest(values: list[Tensor]) -> Tensor:
    """Of all that is finite."""
    return max((x[x.isfinite()].abs().max() for x in values if x.isfinite().any()), default=torch.tensor(0.0))


def run_case(case: Case, dout: Tensor, rng: np.random.Generator, guards: ExitStack) -> list[list[Tensor]]:
    """The op's results, plain torch's, those in float64, and of shaken inputs in float64."""
    # torch's own convolutions may read a little beyond a tensor: they get copies
    before = [copied(x) if isinstance(x, Tensor) else x for x in case.inputs]
    given = [x for x in case.inputs if isinstance(x, Tensor) and x.numel()]
    memory = [spread(x).clone() for x in given]
    with guards:
        got = results(case.function, case.inputs, dout)
        assert all(map(same_bits, map(spread, given), memory)), "an input changed, or what lies between its elements"
        taken = [memory_of(x) for x in given]
        for value in got:
            first, end = memory_of(value) if value.numel() else (0, 0)
            assert all(end <= start or stop <= first for start, stop in taken), "a result lies in an input's memory"
        got = [value.clone() for value in got]
    dout = dout.clone()
    inputs = before, widened(before), shaken(before, rng)
    return [got, *(results(case.reference, each, dout) for each in inputs)]


def compare(case: Case, dtype: torch.dtype, found: list[list[Tensor]]) -> Outcome:
    """Its words are ``FULL``, or what kept some of the results from being compared."""
    _, plain, truth, _ = found
    outcome, first, end = Outcome(set(), set(), {}), 0, len(truth)
    words = outcome.words
    if any(beyond_range(*values) for values in zip(plain, truth, strict=True)):
        words.add("calls beyond the dtype's range")
        return outcome
    share, least = FLAT[dtype]
    flat = [(var < share * mean.square() + least).any() for mean, var in case.statistics(truth)]
    known = 3 + 2 * flat.index(True) if any(flat) else end
    for i, values in enumerate(zip(*(results[:known] for results in found[:3]), strict=True)):
        check_values(case, i, *values)
    if any(flat):  # a channel of nearly one value: behind its norm, what rounding left of it is large, even infinite
        words.add("calls with a channel of nearly one value")
        first, end = 1, known
    elif not truth[0].isfinite().all():
        words.add(NOT_FINITE)
        end = 1
    elif case.lost or (case.picks and case.kind in ("tiny", "zeros", "constant")):
        # of the equals that meet in a pool any may be the one that gets the gradient
        words.add("calls whose gradients rounding decides")
        end = 1
    if first == 0:
        check_result(case, *(values[0] for values in found), outcome)
    for i in range(1, min(end, 1 + 2 * case.norms)):
        mean, var = case.statistics(truth)[(i - 1) // 2]
        size = largest([(mean.square() + var).sqrt() if i % 2 else mean.square() + var])  # of the values it is of
        check_accuracy(f"statistic {i}", Errors.make(*(values[i] for values in found)), dtype, size, outcome)
    gradients = [[values[i] for values in found] for i in range(1 + 2 * case.norms, end)]
    size = largest([truth for _, _, truth, _ in gradients])
    for i, values in enumerate(gradients):
        errors = Errors.make(*values)
        # through a batch norm it is what is left of larger ones
        own = max(largest([errors.truth]), SMALL * size * (case.norms > 0))
        share = TIES if case.norms and dtype == torch.float16 else 0.0
        check_accuracy(f"gradient {i}", errors, dtype, own, outcome, share=share)
        if case.norms:
            check_direction(f"gradient {i}", *values[::2], size, outcome)
    if not words - {ROUNDING}:
        words.add(FULL)
    return outcome


def check_result(case: Case, value: Tensor, plain: Tensor, truth: Tensor, _near: Tensor, outcome: Outcome) -> None:
    errors = Errors.make(value, plain, truth, truth)
    check_accuracy("the result", errors, value.dtype, largest([errors.truth]), outcome)
    size = truth.square().mean().sqrt()
    if case.kind == "normal" and truth.numel() >= 64 and size > 0:
        error, of_plain = (x.square().mean().sqrt() / size for x in errors[1:3])
        if not error <= max(RMS[value.dtype], 2 * of_plain * (value.dtype == torch.float16)):
            said = f"relative error {error:.2e}, plain torch's {of_plain:.2e}"
            outcome.wrong.setdefault("the result", []).append(said)


def check_direction(name: str, value: Tensor, truth: Tensor, size: Tensor, outcome: Outcome) -> None:
    """A value that is 0 before a ReLU, to its rounding, turns a gradient a little; one that is wrong turns it far."""
    if not truth.isfinite().all() or largest([truth]) <= SMALL * size:
        return
    cosine = torch.cosine_similarity(value.double().flatten(), truth.flatten(), dim=0)
    if not cosine >= COSINE:
        outcome.wrong.setdefault(name, []).append(f"cosine {cosine:.3f}")


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def beyond_range(plain: Tensor, truth: Tensor) -> bool:
    """Of the dtype, for which nothing is promised."""
    finite = truth.isfinite()
    return bool((~plain.isfinite() | (truth.abs() > torch.finfo(plain.dtype).max))[finite].any())


def refuse(op: str, case: Case) -> None:
    with pytest.raises((ValueError, TypeError)) as refusal:
        case.function(*case.inputs)
    message = str(refusal.value)
    assert "\n" not in message
    names = [*inspect.signature(getattr(sdr_kernels, op.split()[0])).parameters, *sdr_kernels.NormedBottleneck._fields]
    assert re.match(r"\w+", message)[0] in names, f"does not begin with an argument: {message}"


def some_tile(rng: np.random.Generator):
    """Any tile of the class, as a GPU of any kind and a batch of any size would choose it."""
    arch = str(rng.choice(sorted(load_tiles())))

    def choose(shape_class: str, rows: int) -> dict[str, int]:
        tiles = load_tiles()[arch][shape_class]
        tile = tiles[int(rng.integers(len(tiles)))]
        return {name: value for name, value in tile.items() if name != "min_rows"}

    return forced_tiles(choose)


def attempt(op: str, impl: str, dtype: torch.dtype, arena: Arena, number: int, redrawn: int) -> Outcome:
    """One draw of the values of one case."""
    kind = f"{op} {impl} {dtype}"
    sizes, values = draws.draw(kind, number), draws.draw(f"{kind} values {redrawn}", number)
    odd = Odd(sizes, values, dtype, arena)
    case = MAKERS[op](odd, impl)
    if case.refused:
        refuse(op, case)
        return Outcome({REFUSED}, set(), {})
    guarded = launches_guarded if impl == "triton" else allocations_guarded
    with np.errstate(all="ignore"), ExitStack() as guards:
        guards.enter_context(guarded(lambda: bool(values.integers(2))))
        if odd.chance(0.2):
            guards.enter_context(some_tile(sizes))
        dout = odd.tensor(*result_shape(case), plain=True)
        return compare(case, dtype, run_case(case, dout, values, guards.pop_all()))


def check(op: str, impl: str, dtype: torch.dtype, arena: Arena, number: int) -> set[str]:
    """Draws the values of a case until each result is right in most of the draws that compare it.

    Each, not all at once: a call has up to 22, and in few elements every one is beyond twice plain torch's error now
    and then, as plain torch is beyond twice ours.
    """
    compared, wrong, problems = Counter(), Counter(), []
    for redrawn in range(ATTEMPTS):
        try:
            outcome = attempt(op, impl, dtype, arena, number, redrawn)
        finally:
            arena.release()
        compared.update(outcome.compared)
        wrong.update(outcome.wrong.keys())
        problems += [f"{name}: {', '.join(said)}" for name, said in outcome.wrong.items()]
        open_ones = [name for name, count in wrong.items() if 2 * count >= compared[name]]
        if not open_ones:
            return outcome.words | ({AGAIN} if problems else set())
        if any(compared[name] == DRAWS for name in open_ones):
            break
    raise AssertionError("; ".join(problems))


def result_shape(case: Case) -> list[int]:
    """Of the result."""
    with torch.no_grad():
        out = case.reference(*widened(case.inputs))
    return list((out[0] if isinstance(out, tuple) else out).shape)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # of the interpreter's maximum of nothing but NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "impl"), RUNS)
def test_odd_tensors(op, impl, dtype, record_property):
    arena = Arena()
    done, failed, words = run_apart(lambda number: check(op, impl, dtype, arena, number), draws.numbers(draws.CASES))
    record_property("random calls", done)
    for word, count in words.items():
        record_property(word, count)
    test = f"'tests/test_fuzz_ops.py::test_odd_tensors[{op}-{impl}-{dtype}]'"
    problems = [f"{draws.replay(test, number)}\n{problem}" for number, problem in failed.items()]
    assert not problems, "\n".join(problems)
    assert done < ENOUGH or 2 * words[FULL] >= done - words[REFUSED] - words[NOT_FINITE], f"too little: {words}"


def drawn(monkeypatch, draws_of_case: list[dict[str, bool]]) -> set[str]:
    """What ``check`` says of a case. Each draw: which results it compares, whether wrong; then none is."""
    right = dict.fromkeys(("dx", "dw"), False)
    outcomes = [
        Outcome({FULL}, set(draw), {name: ["error"] for name in draw if draw[name]})
        for draw in draws_of_case + [right] * ATTEMPTS
    ]
    monkeypatch.setattr(sys.modules[__name__], "attempt", lambda *arguments: outcomes[arguments[-1]])
    return check("spatial_mean", "triton", torch.float32, Arena(), 0)


DX, DW, BOTH, NEITHER = ({"dx": x, "dw": w} for x, w in ((1, 0), (0, 1), (1, 1), (0, 0)))


@pytest.mark.parametrize(
    "drawn_ones",
    [[DX] * 5, [DX, NEITHER] * 4 + [DX], [DX, DW] * 4 + [DX], [BOTH] * 4 + [DX], [DX] * 4 + [{}] * 9 + [DX]],
    ids=range(5),
)
def test_a_result_that_is_wrong_in_most_draws_is_wrong(monkeypatch, drawn_ones):
    with pytest.raises(AssertionError, match="dx: error"):
        drawn(monkeypatch, drawn_ones)


@pytest.mark.parametrize("drawn_ones", [[DX], [DX] * 4, [BOTH, DX], [DX, DW], [DX] + [{}] * 3], ids=range(5))
def test_results_that_are_wrong_in_few_draws_are_right(monkeypatch, drawn_ones):
    assert drawn(monkeypatch, drawn_ones) == {FULL, AGAIN}


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


def test_a_write_between_elements_is_caught():
    x, out = torch.arange(5.0), torch.zeros(9)[::2]
    caught = pytest.raises(AssertionError, match="between a tensor's elements was written")
    with caught, launches_guarded(lambda: True):
        _reaching_kernel[(1,)](x, out, len(x), READ=0, WRITE=0, BLOCK=8)


def test_a_crash_is_one_failed_case():
    def run(number: int) -> None:
        if number == 2:
            reached = Arena().tensor(3, torch.float32, at_end=True)
            np.ctypeslib.as_array(ctypes.cast(reached.data_ptr(), ctypes.POINTER(ctypes.c_float)), (4,))[3] = 1
        assert number != 3, "a wrong result"

    done, failed, _ = run_apart(run, iter(range(5)))
    assert done == 5
    assert sorted(failed) == [2, 3]
    assert failed[2].startswith("SIGSEGV")
    assert "a wrong result" in failed[3]
