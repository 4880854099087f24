"""Products with packed weights, and without the private operators that pack them."""

import pytest
import torch
from compare import assert_matches_reference
from test_cpu_path import BLOCKS, assert_bottleneck, make_bottleneck

from sdr_kernels._cpu import products
from sdr_kernels._cpu.products import add_product, multiply, pack


@pytest.fixture(params=["packed", "plain", "disabled"])
def way(request, monkeypatch):
    if request.param == "packed" and not products._HAVE_PACKED:
        pytest.skip("this torch has no packed products")
    monkeypatch.setattr(products, "_HAVE_PACKED", request.param != "plain" and products._HAVE_PACKED)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param != "disabled")
    return request.param


@pytest.mark.parametrize("hint", [0, 1, 40, 5000])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (7, 1, 5), (6, 20, 1), (40, 96, 65), (12, 512, 1024)], ids=str)
@torch.no_grad()
def test_equals_the_definition(way, shape, hint):
    rows, C_in, C_out = shape
    x, weight, bias, out = (torch.randn(s) for s in ((rows, C_in), (C_out, C_in), (C_out,), (rows, C_out)))

    def ours(x, weight, bias, out):
        packed = pack(weight, hint)
        assert packed.is_mkldnn == (way == "packed")
        sums = [out.clone(), out.clone()]
        add_product(sums[0], x, packed, bias)
        add_product(sums[1], x, packed)
        return torch.stack([multiply(x, packed, bias), multiply(x, packed), *sums])

    def definition(x, weight, bias, out):
        y = x @ weight.t()
        return torch.stack([y + bias, y, out + (y + bias), out + y])

    assert_matches_reference(ours, definition, [x, weight, bias, out])


@torch.no_grad()
def test_nan_and_infinity_stay_in_their_row(way):
    x = torch.ones(5, 16)
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    y = multiply(x, pack(torch.ones(32, 16), 5))
    assert y[1].isnan().all()
    assert torch.equal(y[3], torch.full((32,), float("inf")))
    assert torch.equal(y[::2], torch.full((3, 32), 16.0))


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_bottleneck_without_packed_products(shape, monkeypatch):
    monkeypatch.setattr(products, "_HAVE_PACKED", False)
    assert_bottleneck(shape[-1], *make_bottleneck(shape, torch.float32))
