"""conv_moments and conv_norm against plain torch in float64, bit for bit where arithmetic is exact."""

from collections.abc import Callable, Sequence

import pytest
import torch
from compare import widened
from torch import Tensor

from sdr_kernels._cpu.rows import affine, convolve, corners, normed, unpack_code
from sdr_kernels._rows import conv_moments, conv_norm

# B, V, C_in, C_out, T, H, W: on and off the tiles
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 16, 32, 8, 3, 5),
    (1, 8, 3, 17, 3, 4, 3),
    (2, 2, 65, 64, 1, 7, 5),
    (1, 1, 64, 130, 64, 2, 1),
    (3, 2, 130, 3, 2, 5, 7),
    (1, 1, 17, 65, 5, 6, 7),
]
# normed, residual, relu, pool, coded: as _schemes.py asks
WAYS = [
    (True, False, True, 1, False),
    (True, False, True, 4, False),
    (True, False, True, 4, True),
    (False, True, True, 1, False),
    (False, True, True, 2, True),
    (False, False, False, 1, False),
    (False, False, False, 4, True),
]

# the most of half precision that are summed in float32; in the worst order, which the interpreter has, each addition
# rounds the whole sum
TILE_ROWS = 128


def randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device)


def whole(*shape: int, device: torch.device) -> Tensor:
    """Small whole numbers, whose sums of products float16 holds exactly: ties abound."""
    return torch.randint(-2, 3, shape, device=device).float()


def product_inputs(shape: tuple, kernel_size: int, is_normed: bool, dtype, device, draw: Callable = randn) -> list:
    B, V, C_in, C_out, T, H, W = shape
    scale_weight = (C_in * kernel_size) ** -0.5 if draw is randn else 1
    x = draw(B, V, T, H, W, C_in, device=device).to(dtype)
    weight = (draw(V, kernel_size, C_in, C_out, device=device) * scale_weight).to(dtype)
    values = [draw(V, C_in, device=device) for _ in range(2)]
    return [x, *(values if is_normed else (None, None)), weight]


def norm_inputs(shape: tuple, way: tuple, dtype, device, draw: Callable = randn) -> list:
    B, V, _, C_out, T, H, W = shape
    is_normed, has_residual, relu, pool, coded = way
    residual = draw(B, V, T, H, W, C_out, device=device).to(dtype) if has_residual else None
    values = [draw(V, C_out, device=device) for _ in range(2)]
    return [*product_inputs(shape, 1, is_normed, dtype, device, draw), *values, residual, relu, pool, coded]


def assert_close(value: Tensor, plain: Tensor, truth: Tensor, ulp: Tensor | None = None) -> None:
    """``value`` errs against float64 at most twice what plain torch errs, and two ulp; NaN and Inf stand where due."""
    assert value.shape == truth.shape
    assert value.dtype == plain.dtype
    if truth.numel() == 0:
        return
    finite = truth.isfinite()
    assert torch.equal(value.double().nan_to_num(1.0, 2.0, 3.0)[~finite], truth.nan_to_num(1.0, 2.0, 3.0)[~finite])
    if not finite.any():
        return
    truth = truth[finite]
    error, allowed = ((result.double()[finite] - truth).abs().max() for result in (value, plain))
    limit = 2 * (allowed + (torch.finfo(value.dtype).eps * truth.abs().max() if ulp is None else ulp))
    assert error <= limit, f"error {error:.3e}, plain torch's {allowed:.3e}, limit {limit:.3e}"


def assert_pooled(op: Callable, before: Callable, inputs: Sequence, pool: int, coded: bool) -> None:
    """Compare an op's result, and by its code the row that it took; ``before(*inputs)`` is what the pool gets."""
    out, code = op(*inputs, "triton")
    plain, _ = op(*inputs, "cpu")
    truth, true_code = op(*widened(inputs), "cpu")
    assert_close(out, plain, truth)
    assert code.dtype == torch.uint8
    assert code.shape == true_code.shape
    if coded and out.numel():
        best, taken = pool_by_code(before(*widened(inputs)), code, pool)
        assert_close(taken.to(out.dtype), best.to(out.dtype), best)


def pool_by_code(rows: Tensor, code: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """The maximum of each pool's rows, and the row that the code names."""
    candidates = torch.stack(corners(rows, pool))
    which = unpack_code(code, rows.shape[-1]).long()
    return candidates.amax(0), candidates.gather(0, which[None])[0]


def assert_same(op: Callable, inputs: Sequence) -> None:
    for got, expected in zip(op(*inputs, "triton"), op(*inputs, "cpu"), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def before_pool(x, scale, shift, weight, out_scale, out_shift, residual, *_):
    out = affine(convolve(normed(x, scale, shift), weight), out_scale, out_shift)
    return out if residual is None else out + residual


def assert_moments(out: Tensor, moments: Tensor) -> None:
    """They are those of ``out``, to the digits of float64 for float32 rows.

    For others as close as sums in float32 come that have subtracted a row before.
    """
    rows = out.transpose(0, 1).flatten(1, 4).double()  # [V, M, C]
    shifted = rows - rows[:, :1]
    plain, truth = (torch.stack(torch.var_mean(x, 1, correction=0)[::-1], 1) for x in (shifted.float(), shifted))
    moments[:, 0] -= rows[:, 0]
    if out.dtype == torch.float32:
        torch.testing.assert_close(moments, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()), equal_nan=True)
    assert_close_moments(moments, plain.double(), truth, out.dtype)


def assert_close_moments(moments: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    mean, var = truth.unbind(1)
    rounding = 0 if dtype == torch.float32 else TILE_ROWS * torch.finfo(torch.float32).eps / 2
    assert_close(moments[:, 0], plain[:, 0], mean, rounding * (mean.abs() + var.sqrt()).max())
    assert_close(moments[:, 1], plain[:, 1], var, rounding * var.max())


@pytest.mark.parametrize("is_normed", [False, True], ids=["raw", "normed"])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_moments(shape, kernel_size, is_normed, dtype, device):
    inputs = product_inputs(shape, kernel_size, is_normed, dtype, device)
    out, moments = conv_moments(*inputs, "triton")
    plain, plain_moments = conv_moments(*inputs, "cpu")
    truth, true_moments = conv_moments(*widened(inputs), "cpu")
    assert_close(out, plain, truth)
    assert_close_moments(moments, plain_moments, true_moments, dtype)
    assert_moments(out, moments)


@pytest.mark.parametrize("is_normed", [False, True], ids=["raw", "normed"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv_moments_of_whole_numbers(kernel_size, is_normed, dtype, device):
    for shape in SHAPES:
        inputs = product_inputs(shape, kernel_size, is_normed, dtype, device, whole)
        out, moments = conv_moments(*inputs, "triton")
        assert torch.equal(out, conv_moments(*inputs, "cpu")[0])
        assert_moments(out, moments)


def test_a_constant_channel_has_no_variance(dtype, device):
    x = torch.full((3, 2, 5, 7, 9, 1), 1000.1, device=device).to(dtype)  # tiles whose rows are no power of two
    weight = randn(2, 1, 1, 20, device=device).to(dtype)
    out, moments = conv_moments(x, None, None, weight, "triton")
    assert torch.equal(moments[:, 0], out[0, :, 0, 0, 0].double())
    assert torch.equal(moments[:, 1], torch.zeros_like(moments[:, 1]))


def test_a_huge_mean_costs_no_digits(dtype, device):
    step, mean = (1.0, 1500.0) if dtype == torch.float16 else (2.0**-10, 5000.0)
    shape = (3, 2, 5, 7, 9, 1)
    x = (mean + step * torch.randint(-3, 4, shape, device=device)).to(dtype)  # exact
    weight = torch.ones(2, 1, 1, 20, device=device, dtype=dtype)
    out, moments = conv_moments(x, None, None, weight, "triton")
    assert torch.equal(out, x.expand_as(out))
    assert_moments(out, moments)


def test_one_row_far_from_the_others(device):
    """Deviations are taken from a first row, the branch's or the tile's: it may be the strangest."""
    x = randn(2, 1, 5, 7, 9, 1, device=device)
    for row in ((0, 0, 0, 0, 0), (1, 0, 2, 0, 2)):
        x[row] = 1e6
    out, moments = conv_moments(x, None, None, torch.ones(1, 1, 1, 1, device=device), "triton")
    assert_moments(out, moments)


def test_sums_of_many_tiles(dtype, device):
    from sdr_kernels._triton.norm_conv import sum_tiles, sums_reference

    out = (100 + randn(3, 2, 5, 7, 9, 70, device=device)).to(dtype)
    partials = randn(3, 2, -(-5 * 7 * 9 // 4), 2, 70, device=device).abs()
    torch.testing.assert_close(sum_tiles(out, partials, 4), sums_reference(out, partials, 4), rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("is_normed", [False, True], ids=["raw", "normed"])
def test_conv_moments_keeps_nan_and_infinity(is_normed, dtype, device):
    inputs = product_inputs((2, 2, 17, 20, 5, 3, 3), 3, is_normed, dtype, device)
    inputs[0][0, 0, 2, 1, 1, 3] = float("nan")
    inputs[0][1, 1, 4, 0, 2, 0] = float("inf")
    out, moments = conv_moments(*inputs, "triton")
    truth, _ = conv_moments(*widened(inputs), "cpu")
    plain, _ = conv_moments(*inputs, "cpu")
    assert_close(out, plain, truth)
    bad = ~truth.isfinite().transpose(0, 1).flatten(1, 4).all(1)
    assert bad.any()
    assert torch.equal(moments.isfinite(), ~bad[:, None].expand_as(moments))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_norm(shape, way, dtype, device):
    inputs = norm_inputs(shape, way, dtype, device)
    assert_pooled(conv_norm, before_pool, inputs, *way[-2:])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_conv_norm_of_whole_numbers(way, dtype, device):
    for shape in SHAPES:
        assert_same(conv_norm, norm_inputs(shape, way, dtype, device, whole))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_conv_norm_keeps_nan_and_infinity(way, dtype, device):
    """A NaN wins its pool, the last of several; so does an infinity; of minus infinities alone the first is it."""
    inputs = norm_inputs((1, 2, 16, 18, 4, 5, 4), way, dtype, device, whole)
    x, weight = inputs[0], inputs[3]
    weight.fill_(1)
    inputs[1:3] = [value if value is None else value.fill_(1) for value in inputs[1:3]]
    inputs[4].fill_(1)
    x[0, 0, 2, 1, 1, 3] = float("nan")
    x[0, 0, 0, 2:4, 2, 5] = float("nan")
    x[0, 1, 3, 0, 2, 0] = float("inf")
    x[0, 1, :2, 0:2, 0:2, 7] = float("-inf")
    got, expected = conv_norm(*inputs, "triton"), conv_norm(*inputs, "cpu")
    assert expected[0].isnan().any()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], expected[1])


@pytest.mark.promise(row="repeatable")
def test_repeats_bit_for_bit(dtype, device):
    inputs = product_inputs((2, 2, 33, 20, 6, 7, 5), 3, True, dtype, device)
    pooled = norm_inputs((2, 2, 33, 20, 6, 7, 5), WAYS[2], dtype, device)
    for op, arguments in ((conv_moments, inputs), (conv_norm, pooled)):
        first, second = (op(*arguments, "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.promise(row="odd inputs")
def test_no_clips(device):
    shape = (0, 2, 3, 5, 4, 4, 4)
    for is_normed in (False, True):
        out, moments = conv_moments(*product_inputs(shape, 3, is_normed, torch.float32, device), "triton")
        assert out.shape == (0, 2, 4, 4, 4, 5)
        assert moments.isnan().all()
    out, code = conv_norm(*norm_inputs(shape, WAYS[2], torch.float32, device), "triton")
    assert out.shape == (0, 2, 4, 2, 2, 5)
    assert code.shape == (0, 2, 4, 2, 2, 2)


@pytest.mark.promise(row="registered right")
def test_registration(device):
    shape = (1, 2, 16, 20, 3, 4, 2)
    for is_normed in (False, True):
        inputs = product_inputs(shape, 3, is_normed, torch.float32, device)
        torch.library.opcheck(torch.ops.sdr_kernels.conv_moments, (*inputs, "triton"))
    for way in WAYS:
        inputs = norm_inputs(shape, way, torch.float32, device)
        torch.library.opcheck(torch.ops.sdr_kernels.conv_norm, (*inputs, "triton"))
