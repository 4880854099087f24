"""The training stem's ops in Triton against the plain ones in float64, ties, closed forms."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import LAYOUTS

from sdr_kernels._rows import patch_covariance, stem_max, stem_products

triton = pytest.importorskip("triton")

# B, V, C, k, T, H, W: on and off the block sizes, odd and even
SHAPES = [
    (1, 1, 1, 1, 1, 2, 2),
    (2, 4, 8, 5, 2, 9, 7),
    (1, 8, 3, 5, 1, 8, 4),
    (1, 3, 33, 3, 4, 4, 3),
    (3, 1, 17, 3, 2, 15, 5),
    (1, 1, 130, 1, 2, 5, 3),
    (1, 2, 65, 3, 1, 6, 11),
    (1, 2, 64, 5, 2, 34, 37),
    (1, 1, 4, 5, 12, 4, 4),
]
FLOAT32 = torch.finfo(torch.float32).eps
SMALL = (2, 2, 5, 3, 2, 7, 6)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_inputs(shape, dtype, device):
    """Clips, weights, and scales of both signs of which one is 0."""
    B, V, C, k, T, H, W = shape
    x = torch.randn(B, V, 3, T, H, W).to(dtype)
    weight = (torch.randn(V, C, 3, k) / (3 * k) ** 0.5).to(dtype)
    scale, shift = torch.randn(V, C), torch.randn(V, C)
    scale[-1, -1], shift[-1, -1] = 0, 1
    return [tensor.to(device) for tensor in (x, weight, scale, shift)]


def make_gradients(shape, dtype, device):
    """Clips, gradients, results and codes, these of any pixel that exists."""
    B, V, C, _, T, H, W = shape
    x = torch.randn(B, V, 3, T, H, W).to(dtype)
    out_h, out_w = (H // 2 + 1) // 2, (W // 2 + 1) // 2
    d, y = (torch.randn(B, V, T, out_h, out_w, C).to(dtype) for _ in range(2))
    i, j = torch.randint(0, 6, d.shape), torch.randint(0, 6, d.shape)
    i += 2 * (torch.arange(out_h)[:, None, None] == 0) * (i < 2)
    j += 2 * (torch.arange(out_w)[:, None] == 0) * (j < 2)
    i -= 2 * (4 * torch.arange(out_h)[:, None, None] - 2 + i >= H // 2 * 2)
    j -= 2 * (4 * torch.arange(out_w)[:, None] - 2 + j >= W // 2 * 2)
    code = 4 * (3 * (i // 2) + j // 2) + 2 * (i % 2) + j % 2
    return [tensor.to(device) for tensor in (x, d, y, code.to(torch.uint8))]


def three(op, arguments):
    """Results in Triton, in plain torch, and in plain torch in float64."""
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    return op(*arguments, "triton"), op(*arguments, "cpu"), op(*wide, "cpu")


def limit_of(plain, truth, eps, size=0.0):
    """Twice what plain torch errs, and two ulp of the largest, where float64 is finite."""
    finite = truth.isfinite()
    if not finite.any():
        return 0.0
    error = (plain.double() - truth)[finite].abs().max()
    return 2 * (error + eps * max(truth[finite].abs().max(), size))


def assert_close(got, plain, truth, eps, size=0.0):
    assert got.shape == plain.shape == truth.shape
    assert got.dtype == plain.dtype
    assert got.is_contiguous()
    finite = truth.isfinite()
    assert torch.equal(got.double().nan_to_num(1.0, 2.0, 3.0)[~finite], truth.nan_to_num(1.0, 2.0, 3.0)[~finite])
    error, limit = (got.double() - truth)[finite].abs(), limit_of(plain, truth, eps, size)
    assert (error <= limit).all(), f"{error.max():.3e} over {limit:.3e}"


def assert_products_right(x, d, y, code, kernel_size):
    """Sums of products of any dtype are float32 or wider; what cancels errs as the root of its squares' sum does."""
    squares = stem_products(x.double().square(), d.double().square(), y, code, kernel_size, "cpu")
    sizes = [each[each.isfinite()].amax().sqrt() if each.numel() else 0.0 for each in squares]
    results = three(stem_products, [x, d, y, code, kernel_size])
    for i, size in enumerate(sizes):
        assert_close(*(result[i] for result in results), FLOAT32, size)


def assert_covariance_right(x, kernel_size):
    finite = x.double()[x.isfinite()]
    size = finite.square().mean() if finite.numel() else 0.0
    results = three(patch_covariance, [x, kernel_size])
    for i, each in enumerate((size, size**0.5)):
        assert_close(*(result[i] for result in results), FLOAT32, each)


def values_at(code, x, weight, scale, shift):
    """conv * scale + shift in float64 at the pixels that codes name, which must exist."""
    T, H, W = x.shape[3:]
    k = weight.shape[-1]
    x, weight = F.pad(x.double(), (0, 0, 0, 0, k // 2, k // 2)), weight.double()
    z = sum(torch.einsum("bvcthw,vnc->bvthwn", x[:, :, :, i : i + T], weight[..., i]) for i in range(k))
    z = z * scale.double()[:, None, None, None] + shift.double()[:, None, None, None]
    code = code.long()
    i = 4 * torch.arange(code.shape[3], device=code.device)[:, None, None] - 2 + 2 * (code // 12) + code // 2 % 2
    j = 4 * torch.arange(code.shape[4], device=code.device)[:, None] - 2 + 2 * (code // 4 % 3) + code % 2
    assert ((i >= 0) & (i < H // 2 * 2) & (j >= 0) & (j < W // 2 * 2)).all(), "a code names a pixel outside"
    return z.flatten(3, 4).gather(3, (i * W + j).flatten(3, 4)).view(code.shape)


def assert_max_right(arguments):
    (y, code), (plain, _), (truth, _) = three(stem_max, arguments)
    assert_close(y, plain, truth, torch.finfo(y.dtype).eps)
    assert code.dtype == torch.uint8
    assert code.shape == y.shape
    assert code.is_contiguous()
    # where the maximum is unique by this margin only its code passes: a product is float32, whatever x is
    behind = (truth - values_at(code, *arguments))[truth > 0]
    assert (behind <= 8 * FLOAT32 * truth.abs().max()).all(), f"{behind.max():.3e} behind"


@each_shape
def test_stem_max(shape, dtype, device):
    assert_max_right(make_inputs(shape, dtype, device))


@each_shape
def test_stem_products(shape, dtype, device):
    assert_products_right(*make_gradients(shape, dtype, device), shape[3])


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 1, 5, 64, 1, 1), (1, 2, 1, 3, 5, 17, 19), (3, 1, 1, 5, 1, 1, 33)])
def test_patch_covariance(shape, dtype, device):
    assert_covariance_right(make_inputs(shape, dtype, device)[0], shape[3])


@pytest.mark.promise(row="odd inputs")
def test_no_clips(dtype, device):
    x, weight, scale, shift = make_inputs((0, 2, 4, 3, 5, 6, 7), dtype, device)
    y, code = stem_max(x, weight, scale, shift, "triton")
    assert y.shape == code.shape == (0, 2, 5, 2, 2, 4)
    assert (y.dtype, code.dtype) == (dtype, torch.uint8)
    assert_products_right(x, y, y, code, 3)
    assert_covariance_right(x, 3)


LAYOUTS = LAYOUTS | {"one clip for all branches": lambda x: x[:, :1].expand_as(x)}


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_clips(layout, device):
    """Right, and the same bits as for the usual layout."""
    x, *weights = make_inputs(SMALL, torch.float32, device)
    other = LAYOUTS[layout](x)
    x = other.contiguous()
    _, *rows = make_gradients(SMALL, torch.float32, device)
    assert_max_right([other, *weights])
    assert_products_right(other, *rows, 3)
    assert_covariance_right(other, 3)
    for op, arguments in ((stem_max, weights), (stem_products, [*rows, 3]), (patch_covariance, [3])):
        results = zip(op(x, *arguments, "triton"), op(other, *arguments, "triton"), strict=True)
        assert all(torch.equal(a, b) for a, b in results)


def test_first_of_equals(dtype, device):
    """Small whole numbers are exact and often equal: codes are plain torch's."""
    x, weight, scale, shift = make_inputs((2, 2, 19, 3, 2, 18, 15), dtype, device)
    x, weight = x.clamp(-1, 1).round(), (3 * weight).clamp(-1, 1).round()
    scale, shift = scale.sign(), shift.round() + 2
    (y, code), (plain, expected) = (stem_max(x, weight, scale, shift, impl) for impl in ("triton", "cpu"))
    assert torch.equal(y, plain)
    assert torch.equal(code[y > 0], expected[y > 0])


@pytest.mark.parametrize(("H", "W"), [(8, 12), (9, 15), (6, 10), (2, 2)])
def test_without_scale_the_first_pixel_wins(H, W, dtype, device):
    x, weight, scale, shift = make_inputs((1, 2, 5, 3, 2, H, W), dtype, device)
    y, code = stem_max(x, weight, scale * 0, shift.abs(), "triton")
    assert torch.equal(y, shift.abs().to(dtype)[None, :, None, None, None].expand_as(y))
    expected = torch.zeros(y.shape[3:], dtype=torch.uint8, device=device)
    expected[0] += 12
    expected[:, 0] += 4
    assert torch.equal(code, expected[..., :1].expand_as(code))


def test_largest_pixel_anywhere_is_found(device):
    """One bright pixel after another: the code leads back to it wherever its window's results are."""
    H, W = 6, 8
    x = torch.zeros(H * W, 1, 3, 1, H, W, device=device)
    x[:, 0, 1, 0] = torch.eye(H * W, device=device).view(H * W, H, W)
    weight = torch.ones(1, 2, 3, 1, device=device)
    weight[0, 1] = -1
    one = torch.ones(1, 2, device=device)
    y, code = stem_max(x, weight, one * torch.tensor([1.0, -1.0], device=device), 0 * one, "triton")
    assert torch.equal(y[..., 0], y[..., 1])
    assert torch.equal(code[..., 0], code[..., 1])
    where = y[:, 0, 0, ..., 0] == 1  # [H * W, H', W']
    pixel, row, column = where.nonzero().unbind(1)
    found = code[:, 0, 0, ..., 0].long()[where]
    assert torch.equal(4 * row - 2 + 2 * (found // 12) + found // 2 % 2, pixel // W)
    assert torch.equal(4 * column - 2 + 2 * (found // 4 % 3) + found % 2, pixel % W)
    seen = [(max(4 * r - 2, 0), 4 * r + 4) for r in range(2)]
    assert len(pixel) == sum(min(b, H) - a for a, b in seen) * sum(min(b, W) - a for a, b in seen)


def test_products_are_the_gradient_of_the_maximum(device):
    x, weight, scale, shift = (tensor.double() for tensor in make_inputs((2, 2, 4, 3, 3, 9, 10), torch.float32, device))
    y, code = stem_max(x, weight, scale, shift, "cpu")
    d = torch.randn_like(y)
    weight, shift = weight.requires_grad_(), shift.requires_grad_()
    z = values_at(code, x, torch.zeros_like(weight), scale, shift)  # the shift alone
    assert z.shape == y.shape
    k = weight.shape[-1]
    padded = F.pad(x, (0, 0, 0, 0, k // 2, k // 2))
    conv = sum(torch.einsum("bvcthw,vnc->bvnthw", padded[:, :, :, i : i + 3], weight[..., i]) for i in range(k))
    affine = (tensor[:, :, None, None, None] for tensor in (scale, shift))
    z = (conv * next(affine) + next(affine)).flatten(0, 3)
    out = F.max_pool2d(F.max_pool2d(z, 2).relu(), 3, 2, 1).view(*conv.shape[:4], *y.shape[3:5]).movedim(2, -1)
    torch.testing.assert_close(out, y)
    dweight, dshift = torch.autograd.grad(out, (weight, shift), d)
    products, sums = stem_products(x.float(), d.float(), y.float(), code, k, "triton")
    torch.testing.assert_close(products.view_as(weight) * scale[..., None, None], dweight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, dshift, rtol=1e-5, atol=1e-5)


def test_shares_are_added(device):
    """Many programs for one sum, whose shares end within a frame and within a clip."""
    from sdr_kernels._tiles import forced_tiles

    arguments = [*make_gradients((2, 1, 20, 5, 3, 20, 18), torch.float32, device), 5]
    with forced_tiles(lambda *_: {"SHARE": 5, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}):
        assert_products_right(*arguments)
    with forced_tiles(lambda *_: {"SHARE": 5, "BLOCK_M": 64, "num_warps": 4, "num_stages": 1}):
        assert_covariance_right(arguments[0], 5)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
def test_nan_and_infinity_pass(dtype, device):
    x, weight, scale, shift = make_inputs((2, 2, 6, 3, 3, 9, 6), dtype, device)
    x[0, 0, 1, 2, 3, 3] = float("nan")
    x[1, 0, 1, 2, 0, 5] = float("inf")
    (y, code), (plain, _), (truth, _) = three(stem_max, [x, weight, scale, shift])
    assert y.isnan().any()
    assert_close(y, plain, truth, torch.finfo(dtype).eps)
    assert (code < 36).all()
    assert_covariance_right(x, 3)
    assert patch_covariance(x, 3, "triton")[0][1].isfinite().all(), "one branch reaches another"
    x, d, y, code = make_gradients((2, 2, 6, 3, 3, 9, 6), dtype, device)
    d[0, 0, 2, 1, 1, 3], y[0, 0, 2, 1, 1, 3] = float("nan"), 1
    d[1, 1, 1, 0, 1, 2], y[1, 1, 1, 0, 1, 2] = float("inf"), 1
    d[1, 1, 0, 0, 0, 4], y[1, 1, 0, 0, 0, 4] = float("nan"), -1  # clipped: no gradient, whatever it is
    y[0, 1, 1, 1, 1, 5] = float("nan")  # not clipped
    assert_products_right(x, d, y, code, 3)


def test_changes_over_time_are_not_lost(dtype, device):
    """A filter that looks at changes, of an image that hardly changes, cancels most of the second moments."""
    image = 1 + torch.rand(1, 1, 3, 1, 32, 32)
    x = (image + 0.01 * torch.randn(1, 1, 3, 24, 32, 32)).to(dtype).to(device)
    change = torch.zeros(15, dtype=torch.float64, device=device)
    change[1], change[2] = -1, 1
    got, truth = (
        change @ patch_covariance(each, 5, impl)[0][0] @ change for each, impl in ((x, "triton"), (x.double(), "cpu"))
    )
    assert (got - truth).abs() <= 1e-4 * truth


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_large_means(spread, device):
    """The variance of float32 pixels around 1000 is not the difference of two large numbers."""
    x = 1000 + spread * torch.randn(2, 2, 3, 3, 11, 13, device=device)
    x[:, :, 1] *= -3
    covariance, mean = patch_covariance(x, 3, "triton")
    truth, true_mean = patch_covariance(x.double(), 3, "cpu")
    size = truth.diagonal(0, 1, 2).clamp(min=0).sqrt()
    limit = 32 * FLOAT32 * (size[:, :, None] * size[:, None, :]) + 1e-14 * 3000**2  # truth's own
    assert ((covariance - truth).abs() <= limit).all()
    assert ((mean - true_mean).abs() <= 4 * FLOAT32 * true_mean.abs()).all()


@pytest.mark.promise(row="repeatable")
def test_repeats_bit_for_bit(dtype, device):
    shape = (2, 1, 17, 5, 2, 12, 13)
    rows = make_gradients(shape, dtype, device)
    calls = [
        partial(stem_max, *make_inputs(shape, dtype, device), "triton"),
        partial(stem_products, *rows, 5, "triton"),
        partial(patch_covariance, rows[0], 5, "triton"),
    ]
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


@pytest.mark.promise(row="registered right")
def test_registration(device):
    shape = (1, 2, 3, 3, 1, 4, 4)
    x, *rows = make_gradients(shape, torch.float32, device)
    torch.library.opcheck(stem_max, (*make_inputs(shape, torch.float32, device), "triton"))
    torch.library.opcheck(stem_products, (x, *rows, 3, "triton"))
    torch.library.opcheck(patch_covariance, (x, 3, "triton"))
