"""row_products and covariance against plain torch in float64, closed forms, and where NaN may stand."""

import pytest
import torch
from compare import widened

from sdr_kernels._rows import covariance, pooled_size, row_products
from sdr_kernels._triton.row_products import CHAIN, num_splits, written_out

# B, V, C_in, C_out, k, T, H, W: on and off every block size; gradient rows read in place, then written out first
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 2, 16, 32, 3, 8, 3, 5),
    (1, 8, 3, 24, 1, 3, 4, 3),
    (2, 1, 65, 17, 3, 1, 7, 5),
    (1, 1, 24, 130, 1, 64, 2, 1),
    (3, 1, 130, 64, 1, 2, 9, 7),
    (1, 2, 17, 65, 5, 3, 2, 3),
    (1, 1, 130, 130, 3, 5, 3, 3),
    (2, 1, 64, 3, 3, 2, 1, 9),
    (0, 2, 8, 16, 3, 4, 2, 2),
]
# what sdr_kernels._schemes asks for: of c, b, branch1 and a in scheme "fused", in both frozen, in scheme "gram"
OPTIONS = [
    ("normed y z coef", (1, 2)),
    ("y z coef", (1, 2, 4)),
    ("normed z coef", (1, 4)),
    ("z coef", (1,)),
    ("normed y coef", (1, 2)),
    ("y coef", (1, 4)),
    ("normed coef", (4,)),
    ("coef", (1,)),
    ("center y", (1, 2, 4)),
    ("normed center", (1, 4)),
]


def make_inputs(shape, dtype, device, options="normed y z coef", pool=1):
    B, V, C_in, C_out, k, *size = shape
    pooled = pooled_size(size, pool)

    def rows(*shape):
        return torch.randn(B, V, *shape, device=device).to(dtype)

    names = ("normed", "normed", "center")
    values = [torch.randn(V, C_in, device=device) if name in options.split() else None for name in names]
    code = None
    if pool > 1:
        code = torch.randint(256, (B, V, *pooled, -(-C_out // 4)), dtype=torch.uint8, device=device)
        if pool == 2:
            code &= 0b01010101
    y = rows(*pooled, C_out) if "y" in options.split() else None
    z = rows(*size, C_out) if "z" in options else None
    coef = torch.randn(4, V, C_out, device=device) if "coef" in options else None
    return [rows(*size, C_in), *values, rows(*pooled, C_out), y, code, pool, z, coef, k]


def assert_matches_cpu(op, inputs):
    """Errs against float64 at most twice what plain torch errs in the inputs' dtype, and two of float32's ulp."""
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    got = op(*inputs, "triton")
    for x, copy in zip(inputs, before, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x.nan_to_num(), copy.nan_to_num()), "an input changed"
    plain, exact = op(*inputs, "cpu"), op(*widened(inputs), "cpu")
    for value, ours, truth in zip(got, plain, exact, strict=True):
        assert value.shape == truth.shape
        assert value.dtype == torch.float64
        if truth.numel() == 0:
            continue
        finite = truth.isfinite()
        assert torch.equal(value.nan_to_num(1.0, 2.0, 3.0)[~finite], truth.nan_to_num(1.0, 2.0, 3.0)[~finite])
        value, ours, truth = value[finite], ours[finite], truth[finite]
        if truth.numel() == 0:
            continue
        limit = 2 * ((ours - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max())
        error = (value - truth).abs().max()
        assert error <= limit, f"error {error:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_every_shape(shape, dtype, device):
    assert_matches_cpu(row_products, make_inputs(shape, dtype, device))


@pytest.mark.parametrize("pool", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_through_a_pool(shape, pool, dtype, device):
    """Of odd ends, and of one row, which have no place in it, too."""
    assert_matches_cpu(row_products, make_inputs(shape, dtype, device, pool=pool))


@pytest.mark.parametrize(
    "shape", [(2, 1, 17, 20, 1, 3, 3, 2), (1, 1, 130, 18, 3, 2, 3, 3)], ids=["in place", "written"]
)
@pytest.mark.parametrize(("options", "pool"), [(names, pool) for names, pools in OPTIONS for pool in pools])
def test_products_of_every_option(options, pool, shape, dtype, device):
    assert written_out(shape[2], shape[4]) == (shape[2] == 130)
    assert_matches_cpu(row_products, make_inputs(shape, dtype, device, options, pool))


@pytest.mark.parametrize("options", ["", "normed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_covariance_of_every_shape(shape, options, dtype, device):
    inputs = make_inputs(shape, dtype, device, options)[:3]
    assert_matches_cpu(covariance, inputs)
    products, _ = covariance(*inputs, "triton")
    assert torch.equal(products.nan_to_num(), products.transpose(-1, -2).nan_to_num())


def test_taps_look_back_and_ahead(device):
    x = torch.tensor([1.0, 2.0, 3.0], device=device).view(1, 1, 3, 1, 1, 1)
    d = torch.tensor([1.0, 10.0, 100.0], device=device).view_as(x)
    products, sums = row_products(x, None, None, None, d, None, None, 1, None, None, 3, "triton")
    assert products.flatten().tolist() == [1 * 10 + 2 * 100, 1 * 1 + 2 * 10 + 3 * 100, 2 * 1 + 3 * 10]
    assert sums.tolist() == [[111]]


@pytest.mark.parametrize(("pool", "size"), [(2, (2, 1, 1)), (4, (1, 2, 2))])
def test_code_names_the_row(pool, size, device):
    """Four channels to a byte, the first lowest."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0][:pool], device=device).view(1, 1, *size, 1)
    d = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0], device=device).view(1, 1, 1, 1, 1, 5)
    which = [0, 1, 1, 0, 1] if pool == 2 else [0, 3, 2, 1, 2]
    code = [sum(w << 2 * i for i, w in enumerate(which[:4])), which[4]]
    code = torch.tensor(code, dtype=torch.uint8, device=device).view(1, 1, 1, 1, 1, 2)
    products, sums = row_products(x, None, None, None, d, None, code, pool, None, None, 1, "triton")
    assert products.flatten().tolist() == [(w + 1) * 10**i for i, w in enumerate(which)]
    assert sums.tolist() == d.flatten(0, 4).tolist()


def test_rows_outside_are_zero_after_the_norm(device):
    """Not the shift, the center or the offset."""
    x = torch.zeros(1, 1, 3, 1, 1, 1, device=device)
    one, d = torch.ones(1, 1, device=device), torch.ones(1, 1, 3, 1, 1, 1, device=device)
    coef = torch.ones(4, 1, 1, device=device)
    products, sums = row_products(x, one, 4 * one, -one, d, None, None, 1, None, coef, 3, "triton")
    assert products.flatten().tolist() == [2 * 5 * 2, 3 * 5 * 2, 2 * 5 * 2]
    assert sums.tolist() == [[6]]
    assert [value.item() for value in covariance(x, one, one, "triton")] == [0, 1]


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize(
    "shape", [(1, 2, 16, 20, 3, 5, 3, 3), (1, 2, 130, 20, 3, 5, 3, 3)], ids=["in place", "written"]
)
@pytest.mark.parametrize("options", ["normed y z coef", "center y", ""])
def test_nan_and_infinity_stay_where_they_belong(options, shape, dtype, device):
    nan, inf = float("nan"), float("inf")
    x, scale, shift, center, d, y, *rest = make_inputs(shape, dtype, device, options)
    x[0, 0, 0, 1, 1, 3] = nan  # no row of d meets it in the last tap
    x[0, 1, 4, 0, 2, 0] = inf
    d[0, 0, 2, 1, 0, 5] = inf
    if y is not None:
        y[0, 1, 1, 0, 0, 7] = nan  # is not <= 0: the gradient passes
        d[0, 1, 1, 0, 0, 7] = 100
        y[0, 0, 1, 0, 0, 9] = 0
        d[0, 0, 1, 0, 0, 9] = nan
    assert_matches_cpu(row_products, [x, scale, shift, center, d, y, *rest])
    for value, truth in zip(covariance(x, scale, shift, "triton"), covariance(x, scale, shift, "cpu"), strict=True):
        assert torch.equal(value.isfinite(), truth.isfinite())


@pytest.mark.parametrize("C_in", [16, 130])
def test_centers_are_subtracted_before_the_product(C_in, device):
    inputs = make_inputs((2, 2, C_in, 20, 3, 4, 5, 3), torch.float32, device, "center z coef")
    x, center, z, coef = (inputs[i] for i in (0, 3, 8, 9))
    for rows, mean in ((x, center), (z, coef[3])):
        mean.fill_(1000)
        rows.mul_(0.01).add_(1000)
    x[..., 1] = 1000
    assert_matches_cpu(row_products, inputs)


def test_covariance_of_rows_far_from_zero(device):
    """And of a channel that never changes."""
    x = 1000 + torch.randn(2, 1, 2, 7, 5, 70, device=device) / 100
    x[..., 3] = 12.3
    products, mean = covariance(x, None, None, "triton")
    rows = x.double().movedim(1, 0).flatten(1, 4)
    torch.testing.assert_close(mean, rows.mean(1), rtol=0, atol=1e-8)
    rows -= rows.mean(1, keepdim=True)
    exact = rows.transpose(-1, -2) @ rows / rows.shape[1]
    assert (products - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.max()
    assert products[:, 3].abs().max() <= 1e-16


@pytest.mark.promise(row="repeatable")
@pytest.mark.parametrize("C_in", [33, 130])
def test_repeats_bit_for_bit(C_in, dtype, device):
    inputs = make_inputs((2, 1, C_in, 20, 3, 4, 6, 6), dtype, device)
    first, second = ([*row_products(*inputs, "triton"), *covariance(*inputs[:3], "triton")] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sums_in_float32_are_short(device):
    """However many rows there are; and few rows are not cut up."""
    for clips, rows, block in [(16, 32 * 56 * 56, 32), (16, 49 * 16, 64), (1, 10**7, 16), (1, 1, 16)]:
        for programs in (4, 48, 768):
            splits = num_splits(programs, clips, rows, block)
            assert clips * rows <= splits * CHAIN
            assert splits == 1 or clips * rows >= splits * 4 * block
    x = torch.full((1, 1, 1, 100, 100, 1), 0.1, device=device, dtype=torch.float16)
    value = x.flatten()[0].double().item()
    products, sums = row_products(x, None, None, None, x, None, None, 1, None, None, 1, "triton")
    assert abs(products.item() / (10000 * value**2) - 1) < 1e-6
    assert abs(sums.item() / (10000 * value) - 1) < 1e-6


@pytest.mark.parametrize("C_in", [384, 512], ids=["in place", "written out"])
def test_sums_of_float32_rows_are_float64(C_in, device):
    """What is made of them is a difference, which sums in float32 would be gone from."""
    z = torch.randn(1, 1, 1, 16, 64, 3, device=device, dtype=torch.float32) + 1
    x, one = z.new_zeros(1, 1, 1, 16, 64, C_in), z.new_ones(1, 3)
    coef = torch.stack([one, 0 * one, 0 * one, 0 * one])
    _, sums = row_products(x, None, None, None, z, None, None, 1, z, coef, 1, "triton")
    truth = z.double().sum((0, 2, 3, 4))
    torch.testing.assert_close(sums, truth, rtol=1e-13, atol=0)


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("shape", [(1, 2, 16, 20, 3, 3, 2, 2), (1, 1, 130, 5, 3, 3, 2, 2)], ids=["in place", "written"])
def test_registration(shape, device):
    ops = torch.ops.sdr_kernels
    for options, pool in (("normed y z coef", 2), ("", 1)):
        inputs = make_inputs(shape, torch.float32, device, options, pool)
        torch.library.opcheck(ops.row_products, (*inputs, "triton"))
        torch.library.opcheck(ops.covariance, (*inputs[:3], "triton"))
