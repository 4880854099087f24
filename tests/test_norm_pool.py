"""norm_pool against plain torch in float64, bit for bit where arithmetic is exact."""

from collections.abc import Callable

import pytest
import torch
from test_norm_conv import assert_pooled, assert_same, randn, whole

from sdr_kernels._cpu.rows import affine
from sdr_kernels._rows import norm_pool

# B, V, C, T, H, W: on and off the tiles
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 16, 8, 3, 5),
    (1, 8, 3, 3, 4, 3),
    (2, 2, 65, 1, 7, 5),
    (1, 1, 64, 64, 2, 1),
    (3, 2, 130, 2, 5, 7),
    (1, 1, 17, 5, 6, 7),
]
# residual, relu, pool, coded: as _schemes.py asks
WAYS = [
    ("raw", True, 1, False),
    ("scaled", True, 1, False),
    ("raw", True, 2, True),
    ("scaled", True, 2, True),
    ("", True, 4, False),
    ("", True, 4, True),
    ("", False, 4, True),
]


def make_inputs(shape: tuple, way: tuple, dtype, device, draw: Callable = randn) -> list:
    B, V, C, T, H, W = shape
    residual, relu, pool, coded = way
    x, other = (draw(B, V, T, H, W, C, device=device).to(dtype) for _ in range(2))
    values = [draw(V, C, device=device) for _ in range(4)]
    scaled = values[2:] if residual == "scaled" else (None, None)
    return [x, *values[:2], other if residual else None, *scaled, relu, pool, coded]


def before_pool(x, scale, shift, residual, residual_scale, residual_shift, *_):
    out = affine(x, scale, shift)
    return out if residual is None else out + affine(residual, residual_scale, residual_shift)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_plain_torch(shape, way, dtype, device):
    assert_pooled(norm_pool, before_pool, make_inputs(shape, way, dtype, device), *way[-2:])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_whole_numbers(way, dtype, device):
    for shape in SHAPES:
        assert_same(norm_pool, make_inputs(shape, way, dtype, device, whole))


def test_the_first_of_equals_has_the_code(device):
    x = torch.zeros(1, 1, 2, 2, 4, 1, device=device)
    x[0, 0, 0, :, 2:, 0] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    _, code = norm_pool(x, one, zero, None, None, None, True, 4, True, "triton")
    assert code.flatten().tolist() == [0, 1, 0, 0]
    _, code = norm_pool(x, one, zero, None, None, None, True, 2, True, "triton")
    assert code.flatten().tolist() == [0] * 8


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nan_and_infinity_stay_where_they_belong(way, dtype, device):
    inputs = make_inputs((1, 2, 18, 4, 5, 4), way, dtype, device, whole)
    inputs[1].fill_(1)
    x = inputs[0]
    x[0, 0, 2, 1, 1, 3] = float("nan")
    x[0, 0, 0, 2:4, 2, 5] = float("nan")
    x[0, 1, 3, 0, 2, 0] = float("inf")
    x[0, 1, :2, 0:2, 0:2, 7] = float("-inf")
    got, expected = norm_pool(*inputs, "triton"), norm_pool(*inputs, "cpu")
    assert expected[0].isnan().any()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], expected[1])


@pytest.mark.promise(row="repeatable")
def test_repeats_bit_for_bit(dtype, device):
    inputs = make_inputs((2, 2, 33, 6, 7, 5), WAYS[2], dtype, device)
    first, second = (norm_pool(*inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.promise(row="odd inputs")
def test_no_clips(device):
    out, code = norm_pool(*make_inputs((0, 2, 5, 4, 4, 4), WAYS[5], torch.float32, device), "triton")
    assert out.shape == (0, 2, 4, 2, 2, 5)
    assert code.shape == (0, 2, 4, 2, 2, 2)


@pytest.mark.promise(row="registered right")
def test_registration(device):
    for way in WAYS:
        inputs = make_inputs((1, 2, 20, 3, 4, 2), way, torch.float32, device)
        torch.library.opcheck(torch.ops.sdr_kernels.norm_pool, (*inputs, "triton"))
