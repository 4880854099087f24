"""conv_grad and grad_sums against plain torch in float64, closed forms, and what must pass or be masked."""

import pytest
import torch
from compare import ulp

from sdr_kernels._cpu.rows import gradient_rows, pack_code, pool_rows
from sdr_kernels._rows import conv_grad, grad_sums, pooled_size

NAMES = (
    "d", "y", "code", "pool", "z", "coef", "size", "weight", "h", "h_scale", "h_shift", "matrix", "center", "const",
    "residual", "residual_y", "residual_code", "residual_pool", "relu", "z_center",
)  # fmt: skip

# what _schemes.py calls, by layer; "z" is absent where the batch norm is frozen
MASKED = {"h", "relu"}
SUMMED = {"h", "norm", "relu", "sums"}
CALLS = {
    "c, gram": (1, {"y", "matrix", *MASKED}),
    "c, gram, time pool": (2, {"y", "matrix", *MASKED}),
    "c, gram, frozen": (2, {"y", *MASKED}),
    "b, gram": (1, {"matrix", *SUMMED}),
    "b, gram, pool": (4, {"matrix", *SUMMED}),
    "b, gram, frozen": (4, SUMMED),
    "branch1, gram": (1, {"y", "h", "matrix"}),
    "branch1, gram, time pool": (2, {"y", "h", "matrix"}),
    "branch1, gram, pool": (4, {"y", "h", "matrix"}),
    "branch1, gram, frozen": (4, {"y", "h"}),
    "a, branch1": (1, {"coef", "z", "residual"}),
    "a": (1, {"coef", "z", "residual", "residual_y"}),
    "a, time pool": (1, {"coef", "z", "residual", "residual_y", "residual_code"}),
    "a, frozen": (1, {"coef", "residual", "residual_y"}),
    "c, fused": (1, {"y", "coef", "z", *SUMMED}),
    "c, fused, time pool": (2, {"y", "coef", "z", *SUMMED}),
    "c, fused, pool": (2, {"y", "coef", "z", *MASKED}),
    "c, fused, frozen": (2, {"y", "coef", *SUMMED}),
    "b, fused": (1, {"coef", "z", *SUMMED}),
    "b, fused, pool": (4, {"coef", "z", *SUMMED}),
    "branch1, fused": (1, {"y", "coef", "z"}),
    "branch1, fused, time pool": (2, {"y", "coef", "z"}),
    "branch1, fused, pool": (4, {"y", "coef", "z"}),
    "sums without a mask": (1, {"h", "matrix", "sums"}),
}

# B, V, C_out, C_in, T, H, W: on and off every block size
SHAPES = [
    (2, 2, 17, 65, 3, 3, 5),
    (1, 2, 66, 20, 5, 5, 7),
    (1, 1, 1, 1, 1, 1, 1),
    (3, 1, 130, 64, 4, 5, 1),
    (1, 1, 64, 130, 5, 1, 6),
    (1, 8, 3, 17, 64, 1, 3),
]


def random_code(shape, pool, device):
    return pack_code(torch.randint(0, pool, shape, dtype=torch.uint8, device=device))


def with_zeros(x):
    """As what a ReLU puts out: masks differ at 0, which random numbers never are."""
    return torch.where(torch.rand_like(x) < 0.3, 0, x)


def make_inputs(shape, call, dtype, device, kernel=1):
    """Arguments of ``conv_grad`` for a call of ``CALLS``."""
    B, V, C_out, C_in, *size = shape
    pool, flags = call
    residual_pool = 2 if "residual_code" in flags else 1

    def rows(name, C, pool=1):
        if name not in flags:
            return None
        return with_zeros(torch.randn(B, V, *pooled_size(size, pool), C, device=device)).to(dtype)

    def code(C, pool):
        return random_code((B, V, *pooled_size(size, pool), C), pool, device) if pool > 1 else None

    def channels(name, *shape, scale=1.0):
        return torch.randn(*shape, device=device) * scale if name in flags else None

    flags = {"d", *flags}
    matrix = channels("matrix", V, C_in, C_in, scale=C_in**-0.5)
    return (
        rows("d", C_out, pool), rows("y", C_out, pool), code(C_out, pool), pool,
        rows("z", C_out), channels("coef", 4, V, C_out), size,
        channels("d", V, kernel, C_out, C_in, scale=(kernel * C_out) ** -0.5).to(dtype),
        rows("h", C_in), channels("norm", V, C_in), channels("norm", V, C_in),
        None if matrix is None else matrix.to(dtype), channels("matrix", V, C_in), channels("matrix", V, C_in),
        rows("residual", C_in, residual_pool), rows("residual_y", C_in, residual_pool), code(C_in, residual_pool),
        residual_pool, "relu" in flags, channels("sums", V, C_in),
    )  # fmt: skip


def make_sums_inputs(shape, pool, masked, dtype, device):
    """Arguments of ``grad_sums``; C_out of the shape does not matter."""
    B, V, _, C, *size = shape
    pooled = (B, V, *pooled_size(size, pool), C)
    d = torch.randn(pooled, device=device).to(dtype)
    y = with_zeros(torch.randn(pooled, device=device)).to(dtype) if masked else None
    code = random_code(pooled, pool, device) if pool > 1 else None
    return d, y, code, pool, torch.randn(B, V, *size, C, device=device).to(dtype), torch.randn(V, C, device=device)


def with_values(arguments, **values):
    return tuple(values.get(name, value) for name, value in zip(NAMES, arguments, strict=True))


def assert_matches_plain(op, arguments):
    """The kernel errs against float64 at most twice what plain torch errs in the inputs' dtype, and four ulp."""
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    results = [op(*inputs, impl) for inputs, impl in ((arguments, "triton"), (arguments, "cpu"), (wide, "cpu"))]
    if isinstance(results[0], torch.Tensor):
        results = [[result] for result in results]
    for value, plain, truth in zip(*results, strict=True):
        assert value.shape == truth.shape
        assert value.dtype == plain.dtype
        finite = truth.isfinite()
        assert torch.equal(value.double().nan_to_num(1.0, 2.0, 3.0)[~finite], truth.nan_to_num(1.0, 2.0, 3.0)[~finite])
        if not finite.any():
            continue
        error, allowed = ((result.double() - truth)[finite].abs().max() for result in (value, plain))
        # sums are float64 and what is summed is float32
        dtype = torch.float32 if value.dtype == torch.float64 else value.dtype
        limit = 2 * allowed + 4 * ulp(truth[finite].abs().max(), dtype)
        assert error <= limit, f"error {error:.3e}, plain torch's {allowed:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_schemes(call, shape, dtype, device):
    assert_matches_plain(conv_grad, make_inputs(shape, CALLS[call], dtype, device))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taps(shape, kernel, dtype, device):
    call = {1: "a", 3: "a, time pool", 5: "a, frozen"}[kernel]
    assert_matches_plain(conv_grad, make_inputs(shape, CALLS[call], dtype, device, kernel))


@pytest.mark.parametrize("call", ["c, gram, time pool", "b, gram, pool", "branch1, fused, pool"])
def test_taps_after_a_pool(call, dtype, device):
    assert_matches_plain(conv_grad, make_inputs((1, 2, 17, 20, 5, 3, 5), CALLS[call], dtype, device, 3))


@pytest.mark.parametrize("pool", [1, 2, 4])
@pytest.mark.parametrize("shape", [*SHAPES[:3], (1, 2, 1, 65, 30, 5, 9)], ids=str)
def test_sums(shape, pool, dtype, device):
    for masked in (False, True):
        assert_matches_plain(grad_sums, make_sums_inputs(shape, pool, masked, dtype, device))


@pytest.mark.parametrize("call", ["b, gram, pool", "branch1, gram, time pool", "c, fused, time pool"])
def test_one_channel_and_one_row(call, dtype, device):
    assert_matches_plain(conv_grad, make_inputs((1, 1, 1, 1, 1, 1, 1), CALLS[call], dtype, device))


@pytest.mark.promise(row="odd inputs")
def test_no_clips(dtype, device):
    shape = (0, 2, 3, 5, 4, 2, 2)
    out, sums = conv_grad(*make_inputs(shape, CALLS["b, gram"], dtype, device), "triton")
    assert out.shape == (0, 2, 4, 2, 2, 5)
    assert torch.equal(sums, torch.zeros(2, 2, 5, dtype=torch.float64, device=device))
    sums = grad_sums(*make_sums_inputs(shape, 4, False, dtype, device), "triton")
    assert torch.equal(sums, torch.zeros(2, 2, 5, dtype=torch.float64, device=device))


def test_taps_look_back_and_ahead(device):
    d = torch.tensor([1.0, 2.0, 3.0], device=device).view(1, 1, 3, 1, 1, 1)
    weight = torch.tensor([1.0, 10.0, 100.0], device=device).view(1, 3, 1, 1)
    arguments = with_values(make_inputs((1, 1, 1, 1, 3, 1, 1), (1, set()), torch.float32, device), d=d, weight=weight)
    out, sums = conv_grad(*arguments, "triton")
    assert out.flatten().tolist() == [10 * 1 + 100 * 2, 1 * 1 + 10 * 2 + 100 * 3, 1 * 2 + 10 * 3]
    assert sums.shape == (1, 2, 0)


def test_outside_of_time_is_zero_after_the_norm(device):
    """offset is no gradient where there is no row."""
    arguments = make_inputs((1, 1, 1, 1, 2, 1, 1), (1, {"coef"}), torch.float32, device)
    coef = torch.tensor([1.0, 0.0, 5.0, 0.0], device=device).view(4, 1, 1)
    d, weight = torch.zeros(1, 1, 2, 1, 1, 1, device=device), torch.ones(1, 3, 1, 1, device=device)
    out, _ = conv_grad(*with_values(arguments, d=d, coef=coef, weight=weight), "triton")
    assert out.flatten().tolist() == [10, 10]


@pytest.mark.parametrize(("pool", "size"), [(2, (5, 2, 3)), (4, (2, 5, 3))])
def test_a_pool_returns_its_gradient_to_the_first_of_equals(pool, size, device):
    """The derivative of the pool of what is all equal, and of ascending values; an odd end gets nothing."""
    C = 5
    weight = torch.eye(C, device=device).view(1, 1, C, C)
    for x in (torch.ones(1, 1, *size, C, device=device), torch.arange(30.0 * C, device=device).view(1, 1, *size, C)):
        y, code = pool_rows(x, pool)
        d = torch.randn_like(y)
        arguments = make_inputs((1, 1, C, C, *size), (pool, set()), torch.float32, device)
        out, _ = conv_grad(*with_values(arguments, d=d, code=pack_code(code), weight=weight), "triton")
        assert torch.equal(out, gradient_rows(d, None, pack_code(code), pool, size=size))
        corner = 0 if x[0, 0, 0, 0, 0, 0] == 1 else pool - 1
        t, h, w = {2: (corner, 0, 0), 4: (0, corner // 2, corner % 2)}[pool]
        assert torch.equal(out[0, 0, t, h, w], d[0, 0, 0, 0, 0])
        assert out.count_nonzero() == d.count_nonzero()


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("call", ["c, gram, time pool", "b, gram, pool", "a, time pool", "c, fused, time pool"])
def test_nan_and_infinity_stay_where_they_belong(call, value, dtype, device):
    """In each input of rows, one at a time."""
    kernel = 3 if call == "a, time pool" else 1
    for name in ("d", "y", "z", "h", "residual", "residual_y"):
        arguments = make_inputs((1, 2, 17, 20, 4, 2, 3), CALLS[call], dtype, device, kernel)
        rows = dict(zip(NAMES, arguments, strict=True))[name]
        if rows is not None:
            rows[0, 1, 1, 0, 0, 3] = value
            assert_matches_plain(conv_grad, arguments)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_mask_of_nan_passes_and_of_zero_does_not(device):
    """As torch's ReLU: the gradient where y or h is NaN is the incoming one."""
    values = torch.tensor([-1.0, 0.0, 2.0, float("nan")], device=device).view(1, 1, 4, 1, 1, 1)
    d = torch.tensor([1.0, float("inf"), 3.0, 4.0], device=device).view_as(values)
    weight = torch.ones(1, 1, 1, 1, device=device)
    for flags, name in (({"y"}, "y"), (MASKED, "h")):
        arguments = make_inputs((1, 1, 1, 1, 4, 1, 1), (1, flags), torch.float32, device)
        out, _ = conv_grad(*with_values(arguments, d=d, weight=weight, **{name: values}), "triton")
        assert out.flatten().tolist() == [0, 0, 3, 4], name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_sums_keep_nan(device):
    d, y, code, pool, z, center = make_sums_inputs((1, 2, 1, 20, 3, 4, 5), 4, True, torch.float32, device)
    z[0, 1, 2, 3, 1, 7] = d[0, 0, 1, 1, 0, 3] = y[0, 0, 1, 1, 0, 3] = float("nan")
    assert_matches_plain(grad_sums, (d, y, code, pool, z, center))


@pytest.mark.parametrize("call", ["b, gram", "c, fused"])
def test_sums_of_a_large_mean_and_a_small_variance(call, device):
    """The mean is subtracted before, not after, the sum."""
    arguments = make_inputs((2, 2, 17, 20, 3, 5, 7), CALLS[call], torch.float32, device)
    center = 1000 + torch.rand(2, 20, device=device)
    h = center[:, None, None, None] + 0.01 * torch.randn(2, 2, 3, 5, 7, 20, device=device)
    scale = torch.full_like(center, 100.0)
    norm = {"h": h, "h_scale": scale, "h_shift": 0.5 - center * scale, "z_center": center}
    assert_matches_plain(conv_grad, with_values(arguments, **norm))
    for pool in (1, 4):
        d, y, code, _, _, _ = make_sums_inputs((2, 2, 17, 20, 3, 5, 7), pool, True, torch.float32, device)
        assert_matches_plain(grad_sums, (d, y, code, pool, h, center))


def test_rows_beyond_the_end_of_a_tile_are_not_summed(device):
    """Their product is 0, but a constant is not."""
    call = (1, {"h", "matrix", "sums"})
    arguments = make_inputs((1, 2, 3, 5, 3, 1, 1), call, torch.float32, device)
    const = torch.full((2, 5), 1e4, device=device)
    _, sums = conv_grad(*with_values(arguments, const=const), "triton")
    assert ((sums[:, 0] - 3e4).abs() < 100).all()


@pytest.mark.promise(row="repeatable")
def test_repeats_bit_for_bit(dtype, device):
    shape = (2, 2, 33, 20, 3, 5, 7)
    calls = [(conv_grad, make_inputs(shape, CALLS["b, gram, pool"], dtype, device))]
    calls.append((grad_sums, make_sums_inputs(shape, 2, True, dtype, device)))
    for op, arguments in calls:
        first, *others = (op(*arguments, "triton") for _ in range(2))
        for other in others:
            pairs = zip(first, other, strict=True) if op is conv_grad else [(first, other)]
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.promise(row="registered right")
def test_registration(device):
    shape = (1, 2, 16, 20, 4, 2, 3)
    for call in ("b, gram, pool", "a, time pool"):
        arguments = make_inputs(shape, CALLS[call], torch.float32, device)
        torch.library.opcheck(conv_grad.default, (*arguments, "triton"))
    torch.library.opcheck(grad_sums.default, (*make_sums_inputs(shape, 4, True, torch.float32, device), "triton"))
