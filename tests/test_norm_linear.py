"""norm_linear against float64, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches_reference

from sdr_kernels import norm_linear
from sdr_kernels.norm_linear import norm_linear_reference

# leading axes of x, K, N: on and off every block size, and rows for every tile
SHAPES = [
    ((1,), 1, 1),
    ((2, 17), 64, 32),
    ((), 65, 17),
    ((3, 1, 5), 300, 33),
    ((16,), 256, 1),
    ((2, 9), 130, 16),
    ((131,), 70, 65),
    ((0, 3), 8, 4),
]


def make_inputs(shape, dtype, device, *, surrounded=True):
    """x and weight, and with ``surrounded`` bias, gamma, beta and residual."""
    rows, K, N = shape
    inputs = [torch.randn(*rows, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)]
    if surrounded:
        inputs += [torch.randn(N), torch.randn(K), torch.randn(K), torch.randn(*rows, N).to(dtype)]
    return [tensor.to(device) for tensor in inputs]


def run(function, x, weight, bias=None, gamma=None, beta=None, residual=None, *, eps=1e-5, **options):
    norm = None if gamma is None else (gamma, beta, eps)
    return function(x, weight, bias, norm=norm, residual=residual, **options)


TRITON = partial(run, norm_linear, impl="triton")
REFERENCE = partial(run, norm_linear_reference)
# numpy, which computes interpreted kernels, warns of the NaN and overflow that a GPU passes on in silence
QUIET = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def assert_right(inputs, **options):
    assert_matches_reference(partial(TRITON, **options), partial(REFERENCE, **options), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_product(shape, dtype, device):
    assert_right(make_inputs(shape, dtype, device, surrounded=False))


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, activation, dtype, device):
    assert_right(make_inputs(shape, dtype, device), activation=activation)


@pytest.mark.parametrize("present", ["bias", "norm", "residual", "bias and residual"])
def test_every_part_alone(present, dtype, device):
    x, weight, bias, gamma, beta, residual = make_inputs(((3, 7), 40, 24), dtype, device)
    norm = [gamma, beta] if "norm" in present else [None, None]
    ends = [bias if "bias" in present else None, *norm, residual if "residual" in present else None]
    assert_right([x, weight, *ends], activation="gelu")


def misaligned(x):
    """The same values, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    """The same values with gaps on every axis."""
    wide = x.new_full([2 * size for size in x.shape], 99)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def first_of_many(x):
    """The same values as the first of several tokens: rows of neighbours, far apart."""
    return torch.stack([x, *[torch.full_like(x, 99)] * 3], dim=-2)[..., 0, :]


def transposed(x):
    return x.mT.contiguous().mT if x.ndim > 1 else sliced(x)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [misaligned, sliced, transposed])
def test_any_layout(layout, dtype, device):
    assert_right([layout(tensor) for tensor in make_inputs(((2, 5), 48, 20), dtype, device)])


def test_rows_far_apart_are_read_in_place(dtype, device):
    x, weight, bias, gamma, beta, residual = make_inputs(((6,), 48, 32), dtype, device)
    assert_right([first_of_many(x), weight, bias, gamma, beta, first_of_many(residual)])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_identity_weight_is_layer_norm(impl, device):
    x = torch.randn(5, 36, device=device) * 3 + 2
    norm = (torch.ones(36, device=device), torch.zeros(36, device=device), 1e-5)
    got = norm_linear(x, torch.eye(36, device=device), norm=norm, impl=impl)
    torch.testing.assert_close(got, F.layer_norm(x, (36,)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.mean(-1), torch.zeros(5, device=device), rtol=0, atol=1e-6)


def test_identity_weight_is_exact(dtype, device):
    x = torch.randn(9, 40, device=device).to(dtype)
    assert torch.equal(TRITON(x, torch.eye(40, device=device).to(dtype)), x)


def test_gelu_of_known_values(device):
    """x * Phi(x), Phi of the normal distribution."""
    x = torch.tensor([[-8.0, -1.0, 0.0, 1.0, 8.0]], device=device).T
    one = torch.ones(1, 1, device=device)
    expected = torch.tensor([[0.0, -0.15865525, 0.0, 0.84134475, 8.0]], device=device).T
    torch.testing.assert_close(TRITON(x, one, activation="gelu"), expected, rtol=1e-6, atol=1e-6)


def test_equal_values_are_normalised_to_beta(dtype, device):
    gamma, beta = torch.randn(2, 20, device=device)
    x = torch.full((3, 20), 7.0, device=device).to(dtype)
    got = TRITON(x, torch.eye(20, device=device).to(dtype), None, gamma, beta)
    assert torch.equal(got, beta.to(dtype).expand(3, -1))


@pytest.mark.parametrize("value", [0.7, -3.3])
def test_constant_rows_have_no_variance(value, dtype, device):
    """What rounding leaves of a mean would be 316 times as large after the norm."""
    x, weight, bias, gamma, beta, _ = make_inputs(((5,), 65, 17), dtype, device)
    inputs = [torch.full_like(x, value), weight, bias, gamma, beta]
    assert_matches_reference(TRITON, REFERENCE, inputs)


@pytest.mark.parametrize("mean", [1e2, -1e4])
def test_large_mean_and_small_variance(mean, device):
    x, *others = make_inputs(((5,), 200, 17), torch.float32, device)
    assert_right([mean + x, *others])


@QUIET
def test_mean_near_the_largest_float(device):
    """Columns beyond K must not meet it: normalised they overflow, and gamma's 0 times that is NaN."""
    x, weight, bias, gamma, beta, residual = make_inputs(((2,), 32, 8), torch.float32, device)
    got = TRITON(torch.full_like(x, 2.0**120), weight, bias, gamma, beta, residual, eps=1e-9)
    torch.testing.assert_close(got, weight @ beta + bias + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_a_row_is_normalised_away(scale, device):
    x, *others = make_inputs(((5,), 200, 17), torch.float32, device)
    assert_right([scale * x, *others], eps=1e-12)


@pytest.mark.promise(row="odd inputs")
@QUIET
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(value, has_norm, dtype, device):
    x, weight, bias, gamma, beta, residual = make_inputs(((19,), 70, 12), dtype, device)
    x[4, 69] = value
    residual[18, 11] = value
    norm = (gamma, beta) if has_norm else (None, None)
    assert_right([x, weight, bias, *norm, residual])


@pytest.mark.parametrize("name", ["x", "weight", "bias", "gamma", "beta", "residual"])
def test_gradients_come_from_the_reference_alone(name, device):
    names = ("x", "weight", "bias", "gamma", "beta", "residual")
    inputs = dict(zip(names, make_inputs(((3,), 5, 4), torch.float32, device), strict=True))
    inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(run(norm_linear, **inputs).square().sum(), inputs[name])
    assert grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="no gradients"):
        TRITON(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(TRITON(**inputs), REFERENCE(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("surrounded", [False, True])
def test_registration(surrounded, dtype, device):
    x, weight, *others = make_inputs(((2, 3), 20, 7), dtype, device, surrounded=surrounded)
    bias, gamma, beta, residual = others or [None] * 4
    arguments = (x, weight, bias, gamma, beta, 1e-5, surrounded, residual, "triton")
    torch.library.opcheck(torch.ops.sdr_kernels.norm_linear_fwd.default, arguments)


@pytest.mark.promise(row="registered right")
def test_compiles_whole(device):
    inputs = make_inputs(((2, 3), 20, 7), torch.float32, device)
    function = partial(TRITON, activation="gelu")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=0, atol=0)


X, WEIGHT = torch.zeros(2, 5), torch.zeros(3, 5)
NORM = (torch.ones(5), torch.zeros(5), 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., K\].*got \[\]"),
        ({"x": torch.zeros(2, 0)}, r"x must be \[\.\.\., K\].*got \[2, 0\]"),
        ({"weight": torch.zeros(3, 4)}, r"weight must be \[N, K\] = \[N, 5\].*got \[3, 4\]"),
        ({"weight": torch.zeros(5)}, r"weight must be .*got \[5\]"),
        ({"weight": torch.zeros(0, 5)}, r"weight must be .*got \[0, 5\]"),
        ({"bias": torch.zeros(5)}, r"bias must be \[N\] = \[3\], got \[5\]"),
        ({"norm": (torch.ones(3), torch.zeros(5), 1e-5)}, r"gamma must be \[K\] = \[5\], got \[3\]"),
        ({"norm": (torch.ones(5), torch.zeros(3), 1e-5)}, r"beta must be \[K\] = \[5\], got \[3\]"),
        ({"residual": torch.zeros(2, 5)}, r"residual must be \[\.\.\., N\] = \[2, 3\], got \[2, 5\]"),
        ({"activation": "relu"}, "activation must be one of none, gelu, got 'relu'"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must have x's device, cpu, got meta"),
        ({"impl": "hip"}, "impl must be one of .*got 'hip'"),
    ],
)
def test_rejects_value(changes, message):
    with pytest.raises(ValueError, match=message):
        norm_linear(**{"x": X, "weight": WEIGHT, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.int()}, "x must be float32.*got torch.int32"),
        ({"weight": WEIGHT.half()}, "weight must have x's dtype, torch.float32, got torch.float16"),
        ({"bias": torch.zeros(3).half()}, "bias must be torch.float32 for x of torch.float32, got torch.float16"),
        ({"norm": (NORM[0].double(), *NORM[1:])}, "gamma must be torch.float32.*got torch.float64"),
        ({"norm": NORM[:2]}, r"norm must be \(gamma, beta, eps\).*got tuple"),
        ({"norm": NORM[0]}, r"norm must be \(gamma, beta, eps\).*got Tensor"),
        ({"residual": torch.zeros(2, 3).half()}, "residual must have x's dtype"),
    ],
)
def test_rejects_type(changes, message):
    with pytest.raises(TypeError, match=message):
        norm_linear(**{"x": X, "weight": WEIGHT, **changes})


def test_rejects_float64_kernel(device):
    with pytest.raises(RuntimeError, match="x must not be float64"):
        TRITON(X.double().to(device), WEIGHT.double().to(device))
