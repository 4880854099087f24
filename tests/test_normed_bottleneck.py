"""normed_bottleneck against float64 autograd, in both schemes, and what it must refuse."""

from functools import partial

import pytest
import torch
from normed import assert_errs_like_eager, cases, make_conv, results, widened

from sdr_kernels import NormedBottleneck, normed_bottleneck

SCHEMES = ["gram", "fused"]
# B, V, C_in, inner, C_out, k, T, H, W, pool, branch1, time_pool: every kind of block, on and off the block sizes
SHAPES = [
    (2, 2, 16, 8, 16, 3, 3, 2, 3, False, False, False),
    (1, 2, 12, 4, 12, 3, 5, 2, 3, False, False, True),
    (2, 1, 8, 5, 20, 3, 4, 3, 2, False, True, True),
    (1, 8, 7, 4, 16, 1, 2, 2, 3, False, True, False),
    (1, 2, 9, 6, 18, 3, 2, 5, 4, True, True, False),
    (3, 1, 33, 17, 33, 5, 1, 4, 3, False, False, False),
    (1, 1, 5, 4, 8, 3, 64, 2, 2, True, True, False),
    (1, 1, 24, 65, 40, 3, 3, 2, 4, True, True, False),
]


def make_inputs(shape, device, dtype=torch.float32, **values):
    """x and the block; ``values`` as :func:`normed.make_conv`'s."""
    B, V, C_in, inner, C_out, k, T, H, W, pool, branch1, time_pool = shape
    x = torch.randn(B, V, C_in, T, H, W, device=device).to(dtype).requires_grad_()
    sizes = {"a": (C_in, inner, k), "b": (inner, inner, 1), "c": (inner, C_out, 1)}
    if branch1:
        sizes["branch1"] = C_in, C_out, 1
    convs = {name: make_conv(V, *size, dtype, device, **values) for name, size in sizes.items()}
    return x, NormedBottleneck(**convs, pool=pool, time_pool=time_pool)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "impl", "dtype"), cases(SHAPES), ids=str)
def test_errs_like_eager(shape, impl, dtype, scheme, device):
    make = partial(make_inputs, shape, device, dtype)
    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "impl", "dtype"), cases([SHAPES[2], SHAPES[4]]), ids=str)
def test_frozen_errs_like_eager(shape, impl, dtype, scheme, device):
    make = partial(make_inputs, shape, device, dtype)
    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl, "bn": "frozen"})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_any_gamma(gamma, scheme, impl, dtype, device):
    """With gamma 0 all rows of a pool tie, and the gradient goes to the first, as PyTorch's does."""
    make = partial(make_inputs, SHAPES[4], device, dtype, gamma=gamma)
    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_channels(scheme, impl, dtype, device):
    """Half of the channels that go in, and of those that a and b put out, have variance 0."""

    def make():
        # a small gamma, or gradients, 316 times larger through each norm of variance 0, pass float16 in eager too
        x, block = make_inputs((2, 2, 16, 8, 16, 3, 3, 2, 3, False, True, False), device, dtype, gamma=0.1)
        with torch.no_grad():
            x[:, :, ::2] = torch.randn(8, 1, 1, 1, device=device).to(dtype)
            block.a.weight[:, ::2] = 0
            block.b.weight[:, ::2] = 0
            block.branch1.weight[:, ::2, 1::2] = 0  # of the constant channels alone
        return x, block

    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl})


def test_statistics_are_of_the_batch(impl, device):
    """Means and variances as PyTorch's batch norm finds them, over clips, frames and positions, with their rows."""
    x, block = make_inputs(SHAPES[4], device)
    found = normed_bottleneck(x, block, impl=impl).statistics
    assert [each.rows for each in found] == [2 * 5 * 4, 2 * 5 * 4, 2 * 2 * 2, 2 * 5 * 4]
    z = torch.einsum("bvithw,voi->vobthw", x.double(), block.branch1.weight[..., 0].double()).flatten(2)
    torch.testing.assert_close(found[3].mean, z.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3].var, z.var(-1, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[4]], ids=str)
def test_gradcheck_in_float64(shape, scheme):
    x, block = make_inputs((1, 2, *shape[2:3], 2, *shape[4:6], 3, 3, 2, *shape[9:]), torch.device("cpu"))
    x = x.detach().double().requires_grad_()
    tensors = [tensor.detach().double().requires_grad_() for conv in block.convs for tensor in conv.tensors[:3]]

    def function(x, *tensors):
        convs = [type(block.a)(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        layers = [*convs, None][:4]
        return normed_bottleneck(x, NormedBottleneck(*layers, *block[4:]), scheme=scheme, impl="cpu").out

    torch.autograd.gradcheck(function, [x, *tensors])


@pytest.mark.parametrize("bn", ["batch", "frozen"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formulas_are_exact_in_float64(shape, scheme, bn):
    x, block = make_inputs(shape, torch.device("cpu"))
    x, block = x.detach().double().requires_grad_(), widened(block)
    exact = results(normed_bottleneck, x, block, None, bn=bn, impl="reference")
    found = results(normed_bottleneck, x, block, None, bn=bn, scheme=scheme, impl="cpu")
    for name, truth in exact.items():
        assert (found[name] - truth).norm() <= 1e-10 * truth.norm() + 1e-10, name


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_memory_order_of_weights(scheme, impl, device):
    x, block = make_inputs(SHAPES[2], device)

    def reordered(conv):
        weight = conv.weight.detach().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
        return conv._replace(weight=weight.requires_grad_())

    other = block._replace(**{name: reordered(getattr(block, name)) for name in "abc"})
    one, two = (results(normed_bottleneck, x, each, None, scheme=scheme, impl=impl) for each in (block, other))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.promise(row="repeatable")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_repeats_bit_for_bit(scheme, impl, dtype, device):
    x, block = make_inputs(SHAPES[2], device, dtype)
    one, other = (results(normed_bottleneck, x, block, None, scheme=scheme, impl=impl) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_used_twice_in_one_step(scheme, impl, device):
    """The gradients of two calls add up."""
    (x, block), (other, _) = (make_inputs(SHAPES[0], device) for _ in range(2))
    run = partial(normed_bottleneck, block=block, scheme=scheme, impl=impl)
    both = torch.autograd.grad(run(x).out.square().sum() + run(other).out.sum(), block.b.weight)[0]
    one = torch.autograd.grad(run(x).out.square().sum(), block.b.weight)[0]
    two = torch.autograd.grad(run(other).out.sum(), block.b.weight)[0]
    assert torch.equal(both, one + two)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_keep_their_own_dtype(scheme, impl, device):
    """float16 rows with float32 weights: gradients of the weights are float32, and not rounded to float16."""
    x, block = make_inputs(SHAPES[0], device, torch.float16)
    block = block._replace(a=block.a._replace(weight=block.a.weight.detach().float().requires_grad_()))
    dweight = torch.autograd.grad(normed_bottleneck(x, block, scheme=scheme, impl=impl).out.sum(), block.a.weight)[0]
    assert dweight.dtype == torch.float32
    assert not torch.equal(dweight, dweight.half().float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_gradient_of_x(scheme, impl, device):
    """As in the first block behind a frozen stem: the weights' gradients are the same without x's."""
    for shape in SHAPES[:3]:
        x, block = make_inputs(shape, device)
        with_dx = results(normed_bottleneck, x, block, None, scheme=scheme, impl=impl)
        without = results(normed_bottleneck, x.detach(), block, None, scheme=scheme, impl=impl)
        assert all(torch.equal(with_dx[name], value) for name, value in without.items())


def test_double_backward_is_refused(impl, device):
    x, block = make_inputs(SHAPES[0], device)
    with pytest.raises(RuntimeError, match="a kernel's gradient has no derivative"):
        torch.autograd.grad(normed_bottleneck(x, block, impl=impl).out.sum(), x, create_graph=True)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_is_not_lost(scheme, impl, device):
    x, block = make_inputs(SHAPES[0], device)
    x = x.detach().clone()
    x[0, 0, 3, 1, 1, 1] = float("nan")
    found = results(normed_bottleneck, x.requires_grad_(), block, None, scheme=scheme, impl=impl)
    assert found["out"][:, 0].isnan().any()
    assert found["dweight 2"][0].isnan().any()
    assert not found["out"][:, 1].isnan().any()


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_whole(scheme, impl, device):
    x, block = make_inputs(SHAPES[4], device)
    function = partial(normed_bottleneck, scheme=scheme, impl=impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    one, other = (results(f, x, block, None) for f in (compiled, function))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 2, 9, 2, 1, 7)}, ValueError, r"x must have H and W of at least 2 for a pool"),
        ({"x": torch.zeros(2, 9, 2, 5, 7)}, ValueError, r"x must be \[B, V, C, T, H, W\]"),
        ({"x": torch.zeros(0, 2, 9, 2, 5, 7)}, ValueError, r"a must put out more than one row to take statistics of"),
        ({"branch1": None}, ValueError, "branch1 must be given with a pool"),
        ({"time_pool": True}, ValueError, "time_pool must not go with pool"),
        ({"scheme": "eager"}, ValueError, "scheme must be one of gram, fused, got 'eager'"),
        ({"bn": "sync"}, ValueError, "bn must not be 'sync' before torch.distributed is initialised"),
        ({"group": object()}, ValueError, "group must be given with bn='sync' alone"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: this op has no cuda kernel"),
    ],
)
def test_rejects(change, error, message):
    x, block = make_inputs(SHAPES[4], torch.device("cpu"))
    options = {name: value for name, value in change.items() if name in ("bn", "group", "impl", "scheme")}
    block = block._replace(**{name: value for name, value in change.items() if name in block._fields})
    with pytest.raises(error, match=message):
        normed_bottleneck(change.get("x", x), block, **options)


def test_rejects_layers_that_do_not_fit():
    x, block = make_inputs(SHAPES[4], torch.device("cpu"))
    wide = block._replace(b=block.b._replace(weight=torch.zeros(2, 6, 6, 3)))
    with pytest.raises(ValueError, match="b's weight must have k = 1"):
        normed_bottleneck(x, wide)
    with pytest.raises(ValueError, match=r"c's weight must be .* = \[2, C_out, 6, k\] to fit x"):
        normed_bottleneck(x, block._replace(c=block.a))
    with pytest.raises(ValueError, match="c must put out more than one row"):
        normed_bottleneck(x[:1, :, :, :1, :2, :2], block)
    with pytest.raises(TypeError, match="a's gamma must be float32"):
        normed_bottleneck(x, block._replace(a=block.a._replace(gamma=block.a.gamma.int())))
