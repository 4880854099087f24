"""Products with packed weights, and without the private operators that pack them."""

import platform

import pytest
import torch
from compare import assert_matches_reference
from test_cpu_path import BLOCKS, assert_bottleneck, make_bottleneck, run_bottleneck

from sdr_kernels._cpu import products
from sdr_kernels._cpu import temporal_bottleneck as cpu_bottleneck
from sdr_kernels._cpu.products import add_product, multiply, pack


@pytest.fixture(params=["packed", "plain", "disabled"])
def way(request, monkeypatch):
    if request.param == "packed" and platform.machine() != "x86_64":
        pytest.skip("packed products are for x86 alone")
    monkeypatch.setattr(products, "MIN_ROWS", 0)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param != "disabled")
    if request.param == "plain":
        monkeypatch.setattr(products, "packs", lambda: False)
    return request.param


@pytest.mark.parametrize("hint", [1, 40, 5000])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 3, 2), (7, 1, 5), (6, 20, 1), (40, 96, 65), (12, 256, 1024), (12, 512, 1024)], ids=str
)
@torch.no_grad()
def test_equals_the_definition(way, shape, hint):
    rows, C_in, C_out = shape
    x, weight, bias, out = (torch.randn(s) for s in ((rows, C_in), (C_out, C_in), (C_out,), (rows, C_out)))

    def ours(x, weight, bias, out):
        packed = pack(weight, hint, 1)
        assert packed.is_mkldnn == (way == "packed" and C_in <= products.MAX_CHANNELS)
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
    x = torch.ones(5, 17)
    x[1, 3], x[3, 16] = float("nan"), float("inf")
    weight = pack(torch.ones(33, 17), 5, 1)
    added = torch.zeros(5, 33)
    add_product(added, x, weight)
    for y in (added, multiply(x, weight)):
        assert y[1].isnan().all()
        assert torch.equal(y[3], torch.full((33,), float("inf")))
        assert torch.equal(y[::2], torch.full((3, 33), 17.0))


def test_few_rows_are_not_worth_packing():
    weight = torch.ones(4, 4)
    assert pack(weight, products.MIN_ROWS - 1, 1) is weight
    assert pack(weight, products.MIN_ROWS // 2, 2).is_mkldnn == products.packs()


def changed(*args):
    raise TypeError("expected one argument more\nof some kind")


@pytest.mark.parametrize(
    ("operator", "problem"),
    [(changed, "expected one argument more"), (lambda x, *_: x.flip(-1), "they compute something else")],
)
def test_a_torch_with_other_operators_multiplies_by_itself(operator, problem, monkeypatch, caplog):
    products.packs.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn._convolution_pointwise, "default", operator)
    with caplog.at_level("INFO"):
        assert not products.packs()
        weight = torch.ones(4, 4)
        assert pack(weight, products.MIN_ROWS, 1) is weight
    products.packs.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"products on this CPU are torch's own, with no weights packed: {problem}"
    ]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_bottleneck_either_way(shape, packed, monkeypatch):
    monkeypatch.setattr(products, "MIN_ROWS", 0 if packed else float("inf"))
    assert_bottleneck(shape[-1], *make_bottleneck(shape, torch.float32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 64, 16, 3, 4, 10, 5, "pool"), (1, 1, 512, 128, 1, 4, 3, 8, "")], ids=str)
def test_weights_are_packed_for_the_products_they_meet(shape, threads, monkeypatch):
    """Every slab's, the last and lower one's too, on as many threads: else oneDNN packs anew at every product."""
    packed, used = {}, []

    def noting_pack(weight, rows, times):
        weight = weight.clone()
        packed[weight.data_ptr()] = rows, torch.get_num_threads()
        return weight

    def note(x, weight):
        used.append((packed[weight.data_ptr()], (x.numel() // x.shape[-1], torch.get_num_threads())))

    def noting_multiply(x, weight, bias=None):
        note(x, weight)
        return multiply(x, weight, bias)

    def noting_add(out, x, weight, bias=None):
        if bias is not None:  # c's: a tap beside the middle has a frame less
            note(x, weight)
        add_product(out, x, weight, bias)

    torch.set_num_threads(threads)
    monkeypatch.setattr(cpu_bottleneck, "pack", noting_pack)
    monkeypatch.setattr(cpu_bottleneck, "multiply", noting_multiply)
    monkeypatch.setattr(cpu_bottleneck, "add_product", noting_add)
    _, inputs = make_bottleneck(shape, torch.float32)
    with torch.no_grad():
        run_bottleneck(shape[-1], *inputs)
    assert len(used) >= 3
    assert all(hint == met for hint, met in used)
