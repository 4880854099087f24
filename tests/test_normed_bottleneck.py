"""normed_bottleneck against float64 autograd, in both schemes, and what it must refuse."""

from functools import partial

import pytest
import torch
from normed import assert_errs_like_eager, make_conv

from sdr_kernels import NormedBottleneck, normed_bottleneck

SCHEMES = ["gram", "fused"]
# B, V, C_in, inner, C_out, k, T, H, W, pool, branch1, time_pool: every kind of block, on and off the block sizes
SHAPES = [
    (2, 2, 16, 8, 16, 3, 4, 3, 5, False, False, False),
    (1, 4, 12, 3, 12, 3, 5, 2, 3, False, False, True),
    (2, 1, 8, 5, 20, 3, 6, 3, 2, False, True, True),
    (1, 8, 7, 4, 16, 1, 3, 2, 2, False, True, False),
    (1, 2, 9, 6, 18, 3, 2, 5, 7, True, True, False),
    (3, 1, 33, 17, 33, 5, 1, 4, 3, False, False, False),
    (1, 1, 5, 2, 8, 3, 64, 2, 2, True, True, False),
    (2, 3, 24, 65, 40, 3, 3, 2, 4, True, True, False),
]


def make_inputs(shape, device, dtype=torch.float32, **values):
    """x and the block; ``values`` as :func:`normed.make_conv`'s."""
    B, V, C_in, inner, C_out, k, T, H, W, pool, branch1, time_pool = shape
    x = torch.randn(B, V, C_in, T, H, W, device=device).to(dtype).requires_grad_()
    sizes = {"a": (C_in, inner, k), "b": (inner, inner, 1), "c": (inner, C_out, 1)}
    if branch1:
        sizes["branch1"] = C_in, C_out, 1
    convs = {name: make_conv(V, *size, dtype, device, **values) for name, size in sizes.items()}
    return x, NormedBottleneck(**convs, pool=pool, time_pool=time_pool)


@pytest.fixture(params=["triton", "cpu"])
def impl(request, device):
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's own implementation takes CPU tensors")
    return request.param


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_like_eager(shape, scheme, impl, dtype, device):
    make = partial(make_inputs, shape, device, dtype)
    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_frozen_errs_like_eager(shape, scheme, impl, dtype, device):
    make = partial(make_inputs, shape, device, dtype)
    assert_errs_like_eager(normed_bottleneck, make, {"scheme": scheme, "impl": impl, "bn": "frozen"})
