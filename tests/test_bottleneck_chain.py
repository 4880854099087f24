"""bottleneck_chain against its blocks one by one in float64, whatever the rows of a map, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import LAYOUTS, assert_matches_reference

from sdr_kernels import FoldedBottleneck, FoldedConv, bottleneck_chain
from sdr_kernels._ops import DTYPES

# inner and output channels, k, and which of branch1, pool, time_pool
STAGES = {
    "one block": [(4, 8, 3, "")],
    "two pools": [
        (4, 16, 3, "branch1"),
        (6, 16, 3, " time_pool"),
        (8, 24, 3, "branch1 pool"),
        (4, 10, 1, "branch1 pool"),
    ],
    "three pools": [(4, 8, 5, "branch1 pool"), (4, 8, 1, "branch1 pool time_pool"), (4, 128, 3, "branch1 pool")],
    "wide": [(16, 128, 3, "branch1"), (16, 128, 3, ""), (24, 160, 3, "branch1 pool"), (16, 160, 3, "")],
}


def make_blocks(stages, *, V=2, C_in=8):
    """Flat (weight, scale, shift) tensors of every block in float32, and each block's number of them and flags."""
    tensors, plan = [], []
    for inner, C_out, k, flags in stages:
        sizes = [(inner, C_in, k), (inner, inner, 1), (C_out, inner, 1)] + [(C_out, C_in, 1)] * ("branch1" in flags)
        for rows, columns, kernel in sizes:
            tensors += [torch.randn(V, rows, columns, kernel) / (columns * kernel) ** 0.5]
            tensors += [torch.randn(V, rows), torch.randn(V, rows) / 2]
        plan.append((len(sizes), " pool" in flags, "time_pool" in flags))
        C_in = C_out
    return tensors, plan


def run(plan, x, *tensors, impl="auto"):
    layers = iter(FoldedConv(*tensors[i : i + 3]) for i in range(0, len(tensors), 3))
    blocks = []
    for count, pool, time_pool in plan:
        a, b, c, *branch1 = (next(layers) for _ in range(count))
        blocks.append(FoldedBottleneck(a, b, c, *(branch1 or [None]), pool, time_pool))
    return bottleneck_chain(x, blocks, impl=impl)


def assert_right(stages, x, impl="auto"):
    tensors, plan = make_blocks(stages, V=x.shape[1], C_in=x.shape[2])
    tensors = [t.to(x.dtype) if t.ndim == 4 else t for t in tensors]
    assert_matches_reference(partial(run, plan, impl=impl), partial(run, plan, impl="reference"), [x, *tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_matches_reference(name, threads, dtype):
    torch.set_num_threads(threads)
    assert_right(STAGES[name], torch.randn(2, 2, 8, 6, 17, 11).to(dtype))


@pytest.mark.parametrize("H", [4, 5, 7, 8, 9, 12, 15])
def test_any_number_of_rows(H):
    assert_right(STAGES["two pools"], torch.randn(1, 1, 8, 5, H, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout):
    assert_right(STAGES["two pools"], LAYOUTS[layout](torch.randn(1, 2, 8, 3, 9, 8)))


def test_no_clips():
    assert_right(STAGES["two pools"], torch.randn(0, 2, 8, 4, 8, 8))


def test_kernels_run_block_by_block(dtype, device):
    tensors, plan = make_blocks(STAGES["two pools"])
    inputs = [torch.randn(1, 2, 8, 2, 4, 5, device=device).to(dtype)]
    inputs += [(t.to(dtype) if t.ndim == 4 else t).to(device) for t in tensors]
    assert_matches_reference(partial(run, plan, impl="triton"), partial(run, plan, impl="reference"), inputs)


def test_registered_op():
    tensors, plan = make_blocks(STAGES["two pools"])
    layers, offset = [], 0
    for count, _, _ in plan:
        layers += [*tensors[offset : offset + 3 * count], *[None] * (12 - 3 * count)]
        offset += 3 * count
    pools, time_pools = ([flags[i] for flags in plan] for i in (1, 2))
    arguments = (torch.randn(1, 2, 8, 2, 8, 5), layers, pools, time_pools, "cpu")
    torch.library.opcheck(torch.ops.sdr_kernels.bottleneck_chain_fwd.default, arguments)


def test_compiles():
    tensors, plan = make_blocks(STAGES["one block"])
    x = torch.randn(1, 2, 8, 2, 4, 4)
    compiled = torch.compile(partial(run, plan), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *tensors), run(plan, x, *tensors))


@pytest.mark.parametrize("threads", [1, 2])
def test_autocast_changes_nothing(threads):
    torch.set_num_threads(threads)
    tensors, plan = make_blocks(STAGES["wide"])
    x = torch.randn(1, 2, 8, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(plan, x, *tensors)
    torch.testing.assert_close(ours, run(plan, x, *tensors))


def test_gradients_are_the_reference():
    tensors, plan = make_blocks(STAGES["two pools"])
    x = torch.randn(1, 2, 8, 2, 8, 8, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(run(plan, x, *tensors, impl=impl).sum(), x)[0] for impl in ("auto", "reference")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_no_blocks(impl):
    with pytest.raises(ValueError, match="blocks must hold at least one bottleneck, got none"):
        bottleneck_chain(torch.zeros(1, 1, 8, 2, 4, 4), [], impl=impl)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "error", "message"),
    [
        ((1, 2, 8, 2, 4), torch.float32, {}, ValueError, r"blocks\[0\]: x must be"),
        ((1, 2, 8, 0, 4, 4), torch.float32, {}, ValueError, "x must"),
        ((1, 3, 8, 2, 4, 4), torch.float32, {}, ValueError, "a's weight must"),
        ((1, 2, 9, 2, 4, 4), torch.float32, {}, ValueError, "a's weight must"),
        (
            (1, 2, 8, 2, 3, 3),
            torch.float32,
            {},
            ValueError,
            r"blocks\[3\]: x must have H and W of at least 2 for a pool",
        ),
        ((1, 2, 8, 1, 4, 4), torch.float32, {}, ValueError, "x must have T of at least 2 for a pool over time"),
        ((1, 2, 8, 2, 4, 4), torch.float16, {}, TypeError, "a's weight must have x's dtype"),
        ((1, 2, 8, 2, 4, 4), torch.float64, {}, TypeError, r"blocks\[0\]: a's scale must be torch.float64"),
        ((1, 2, 8, 2, 4, 4), torch.float32, {"impl": "gpu"}, ValueError, "impl must be one of"),
    ],
    ids=str,
)
def test_errors_name_the_argument(shape, dtype, options, error, message):
    tensors, plan = make_blocks(STAGES["two pools"])
    with pytest.raises(error, match=message):
        run(plan, torch.zeros(shape, dtype=dtype), *tensors, **options)


def test_blocks_must_fit_each_other():
    tensors, _ = make_blocks([(4, 8, 3, ""), (4, 8, 3, "")])
    tensors[9] = torch.zeros(2, 4, 7, 3)
    with pytest.raises(ValueError, match=r"blocks\[1\]: a's weight must"):
        run([(3, False, False)] * 2, torch.zeros(1, 2, 8, 2, 4, 4), *tensors)
