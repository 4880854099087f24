"""normed_stem against float64 autograd, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import pools_may_vary
from normed import assert_errs_like_eager, cases, make_conv, results

from sdr_kernels import normed_stem

# B, V, C, k, T, H, W: on and off the block sizes, odd ends that the pools drop
SHAPES = [
    (2, 2, 8, 5, 3, 6, 6),
    (1, 3, 5, 5, 3, 7, 5),
    (3, 1, 17, 3, 1, 6, 9),
    (1, 8, 4, 1, 2, 2, 2),
    (1, 1, 65, 5, 2, 5, 6),
    (1, 1, 3, 5, 64, 4, 4),
]


def make_inputs(shape, device, dtype=torch.float32, *, per_branch=True, **values):
    B, V, C, k, T, H, W = shape
    x = torch.randn(B, *[V] * per_branch, 3, T, H, W, device=device).to(dtype)
    return x, make_conv(V, 3, C, k, dtype, device, **values)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize(("shape", "impl", "dtype"), cases(SHAPES), ids=str)
def test_errs_like_eager(shape, impl, dtype, device):
    draws = 1 if shape[4] == 64 else 3  # the kernel has a program for each frame, which takes long to interpret
    assert_errs_like_eager(normed_stem, partial(make_inputs, shape, device, dtype), {"impl": impl}, draws)


@pytest.mark.parametrize(("shape", "impl", "dtype"), cases(SHAPES[:2]), ids=str)
def test_frozen_errs_like_eager(shape, impl, dtype, device):
    assert_errs_like_eager(normed_stem, partial(make_inputs, shape, device, dtype), {"impl": impl, "bn": "frozen"})


@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_any_gamma(gamma, impl, dtype, device):
    """With gamma 0 all pixels tie, and the gradient goes to the first, as PyTorch's does."""
    make = partial(make_inputs, SHAPES[1], device, dtype, gamma=gamma)
    assert_errs_like_eager(normed_stem, make, {"impl": impl})


def test_one_clip_for_all_branches(impl, dtype, device):
    make = partial(make_inputs, SHAPES[0], device, dtype, per_branch=False)
    shared = lambda x, conv, **options: normed_stem(x, conv, **options)  # noqa: E731
    x, conv = make()
    each = x[:, None].expand(-1, len(conv.weight), -1, -1, -1, -1)
    one, other = (results(shared, views, conv, None, impl=impl) for views in (x, each))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.promise(row="odd inputs")
def test_strided_views(impl, dtype, device):
    x, conv = make_inputs(SHAPES[1], device, dtype)
    other = x.transpose(1, -1).contiguous().transpose(1, -1)
    one, two = (results(normed_stem, views, conv, None, impl=impl) for views in (x, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradcheck_in_float64(device):
    x, conv = make_inputs((2, 2, 3, 5, 3, 6, 6), torch.device("cpu"))
    tensors = [tensor.detach().double().requires_grad_() for tensor in conv.tensors[:3]]
    function = lambda *t: normed_stem(x.double(), type(conv)(*t), impl="cpu").out  # noqa: E731
    torch.autograd.gradcheck(function, tensors)


def test_a_gradient_of_the_views_is_the_references(device):
    x, conv = make_inputs(SHAPES[0], device)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot run: x asks for a gradient"):
        normed_stem(x, conv, impl="triton")
    with pools_may_vary():
        plain = torch.autograd.grad(normed_stem(x, conv, impl="reference").out.sum(), x)
    if device.type == "cpu":
        assert torch.equal(torch.autograd.grad(normed_stem(x, conv).out.sum(), x)[0], plain[0])


def test_double_backward_is_refused(impl, device):
    x, conv = make_inputs(SHAPES[0], device)
    with pytest.raises(RuntimeError, match="a kernel's gradient has no derivative"):
        torch.autograd.grad(normed_stem(x, conv, impl=impl).out.sum(), conv.weight, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 2, 3, 2, 1, 8)}, ValueError, r"x must be \[B, 3, T, H, W\] .* got \[1, 2, 3, 2, 1, 8\]"),
        ({"x": torch.zeros(1, 5, 3, 2, 8, 8)}, ValueError, r"x must have a clip for each of weight's 2 branches"),
        ({"x": torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)}, TypeError, "x must be float32"),
        ({"weight": torch.zeros(2, 4, 3, 4)}, ValueError, r"conv's weight must be \[V, C, 3, k\]"),
        ({"gamma": torch.zeros(2, 3)}, ValueError, r"conv's gamma must be \[V, C_out\] = \[2, 4\], got \[2, 3\]"),
        ({"running_var": None, "bn": "frozen"}, ValueError, "conv's running_var must be given where bn is frozen"),
        ({"bn": "sync"}, ValueError, "bn must not be 'sync' before torch.distributed is initialised"),
        ({"bn": "none"}, ValueError, "bn must be one of batch, frozen, sync, got 'none'"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: this op has no cuda kernel"),
    ],
)
def test_rejects(change, error, message):
    x, conv = make_inputs((1, 2, 4, 5, 2, 8, 8), torch.device("cpu"))
    options = {name: value for name, value in change.items() if name in ("bn", "impl")}
    conv = conv._replace(**{name: value for name, value in change.items() if name in conv._fields})
    with pytest.raises(error, match=message):
        normed_stem(change.get("x", x), conv, **options)
