"""temporal_conv3d against float64, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import LAYOUTS, assert_matches_reference

from sdr_kernels import temporal_conv3d
from sdr_kernels.temporal_conv3d import temporal_conv3d_reference

# B, V, C_in, C_out, k, T, H, W: on and off every block size
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 4, 16, 32, 3, 8, 3, 5),
    (1, 8, 3, 24, 5, 3, 4, 3),
    (2, 2, 65, 17, 3, 1, 7, 5),
    (1, 1, 24, 129, 3, 64, 2, 1),
    (3, 1, 33, 64, 1, 2, 5, 7),
    (1, 2, 130, 40, 5, 3, 2, 3),
    (0, 2, 8, 16, 3, 4, 2, 2),
]


def make_inputs(shape, dtype, device, *, epilogue=True, grad=False):
    B, V, C_in, C_out, k, T, H, W = shape
    x = torch.randn(B, V, C_in, T, H, W, device=device)
    weight = torch.randn(V, C_out, C_in, k, device=device) / (C_in * k) ** 0.5
    inputs = [x.to(dtype), weight.to(dtype)]
    if epilogue:
        inputs += [torch.randn(V, C_out, device=device), torch.randn(V, C_out, device=device)]
        inputs.append(torch.randn(B, V, C_out, T, H, W, device=device).to(dtype))
    return [tensor.requires_grad_(grad) for tensor in inputs]


def run(function, x, weight, scale=None, shift=None, residual=None, relu=False, **options):
    return function(x, weight, scale, shift, residual=residual, relu=relu, **options)


TRITON = partial(run, temporal_conv3d, impl="triton")
REFERENCE = partial(run, temporal_conv3d_reference)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_matches_reference(TRITON, REFERENCE, make_inputs(shape, dtype, device, epilogue=False, grad=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue_matches_reference(shape, relu, dtype, device):
    inputs = make_inputs(shape, dtype, device, grad=True)
    assert_matches_reference(partial(TRITON, relu=relu), partial(REFERENCE, relu=relu), inputs)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, dtype, device):
    x, *rest = make_inputs((2, 2, 17, 20, 3, 4, 3, 5), dtype, device)
    assert_matches_reference(TRITON, REFERENCE, [LAYOUTS[layout](x), *rest])


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of numpy
def test_nan_and_infinity_stay_where_they_belong(dtype, device):
    x, weight, *rest = make_inputs((1, 2, 16, 20, 3, 5, 3, 3), dtype, device)
    x[0, 0, 3, 2, 1, 1] = float("nan")
    x[0, 1, 0, 4, 0, 2] = float("inf")
    relu = {"relu": True}
    assert_matches_reference(partial(TRITON, **relu), partial(REFERENCE, **relu), [x, weight, *rest])


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_gradients_keep_the_range_of_the_reference(device):
    """A scale that float16 does not hold times weights is applied to the gradient, as the reference does."""
    x, weight, scale, shift, _ = make_inputs((1, 1, 16, 16, 3, 2, 2, 2), torch.float16, device, grad=True)
    scale = torch.full_like(scale, 1e-5).requires_grad_()
    assert_matches_reference(TRITON, REFERENCE, [x, weight, scale, shift])


def test_relu_passes_gradients_as_torch_does(device):
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan")], device=device).view(1, 1, 1, 4, 1, 1).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, device=device)
    dout = torch.tensor([1.0, float("inf"), 3.0, 4.0], device=device).view_as(x)
    for impl in ("reference", "triton"):
        (dx,) = torch.autograd.grad(temporal_conv3d(x, weight, relu=True, impl=impl), x, dout)
        assert dx.flatten().tolist() == [0, 0, 3, 4], impl


def test_taps_look_back_and_ahead(device):
    x = torch.tensor([1.0, 2.0, 3.0], device=device).view(1, 1, 1, 3, 1, 1)
    weight = torch.tensor([1.0, 10.0, 100.0], device=device).view(1, 1, 1, 3)
    out = temporal_conv3d(x, weight, impl="triton")
    assert out.flatten().tolist() == [10 * 1 + 100 * 2, 1 * 1 + 10 * 2 + 100 * 3, 1 * 2 + 10 * 3]


def test_branches_have_their_own_weights(device):
    x = torch.ones(1, 3, 1, 2, 1, 1, device=device)
    weight = torch.tensor([1.0, 2.0, 3.0], device=device).view(3, 1, 1, 1)
    assert temporal_conv3d(x, weight, impl="triton").flatten().tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.promise(row="repeatable")
def test_repeats_bit_for_bit(dtype, device):
    inputs = make_inputs((2, 2, 33, 20, 3, 4, 5, 3), dtype, device, grad=True)
    runs = [torch.autograd.grad(TRITON(*inputs).square().sum(), inputs) for _ in range(3)]
    for run_again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run_again, strict=True))


@pytest.mark.promise(row="registered right")
def test_registration(device):
    x, weight, scale, shift, residual = make_inputs((1, 2, 16, 20, 3, 3, 2, 2), torch.float32, device)
    ops = torch.ops.sdr_kernels
    torch.library.opcheck(ops.temporal_conv3d_fwd, (x, weight, scale, shift, residual, True, "triton"))
    torch.library.opcheck(ops.temporal_conv3d_fwd, (x, weight, None, None, None, False, "triton"))
    torch.library.opcheck(ops.temporal_conv3d_dweight, (x, residual, 3, "triton"))


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_compiles_whole(device):
    inputs = make_inputs((1, 2, 16, 20, 3, 3, 2, 2), torch.float32, device, grad=True)
    compiled = torch.compile(TRITON, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, TRITON)]
    torch.testing.assert_close(
        *results
    )  # not bit for bit: the memory order of a gradient, and so of its sums, may differ


def test_gradient_of_a_gradient_is_refused(device):
    inputs = make_inputs((1, 1, 16, 16, 3, 3, 2, 2), torch.float32, device, grad=True)
    for loss in (TRITON(*inputs).sum(), TRITON(*inputs).square().sum()):
        with pytest.raises(RuntimeError, match=r"a kernel's gradient has no derivative .*impl='reference' has it"):
            torch.autograd.grad(loss, inputs[:1], create_graph=True)


X, W, S = torch.zeros(1, 2, 3, 4, 5, 5), torch.zeros(2, 6, 3, 3), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[B, V, C, T, H, W\].*got \[2, 3, 4, 5, 5\]"),
        ({"x": X[:, :, :, :0]}, ValueError, r"all but B at least 1, got \[1, 2, 3, 0, 5, 5\]"),
        ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"weight": W[:1]}, ValueError, r"weight must be .* = \[2, C_out, 3, k\] to fit x, got \[1, 6, 3, 3\]"),
        ({"weight": W[:, :, :2]}, ValueError, r"weight must be .* to fit x, got \[2, 6, 2, 3\]"),
        ({"weight": W[..., :2]}, ValueError, r"k in 1, 3, 5, got \[2, 6, 3, 2\]"),
        ({"weight": W.half()}, TypeError, "weight must have x's dtype, torch.float32, got torch.float16"),
        ({"weight": W.to("meta")}, ValueError, "weight must have x's device, cpu, got meta"),
        ({"scale": S[:1]}, ValueError, r"scale must be \[V, C_out\] = \[2, 6\], got \[1, 6\]"),
        ({"shift": S.double()}, TypeError, "shift must be torch.float32 for x of torch.float32, got torch.float64"),
        ({"residual": X}, ValueError, r"residual must be .* = \[1, 2, 6, 4, 5, 5\], got"),
        ({"impl": "hip"}, ValueError, "impl must be one of auto, reference, cpu, triton, cuda, got 'hip'"),
        ({"impl": "cpu"}, RuntimeError, "impl='cpu' cannot run: this op has no implementation of its own"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        temporal_conv3d(**{"x": X, "weight": W} | arguments)


def test_float64_is_for_the_reference():
    out = temporal_conv3d(X.double(), W.double(), S.double())
    assert out.dtype == torch.float64
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: x must not be float64"):
        temporal_conv3d(X.double(), W.double(), impl="triton")


def test_triton_is_refused_without_a_gpu_or_the_interpreter(monkeypatch):
    from sdr_kernels import _ops

    monkeypatch.setattr(_ops, "interpreted", lambda: False)
    _ops._why_not.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs CUDA tensors, got cpu"):
            temporal_conv3d(X, W, impl="triton")
    finally:
        _ops._why_not.cache_clear()
