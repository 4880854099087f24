"""temporal_conv3d against float64, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference

from sdr_kernels import temporal_conv3d
from sdr_kernels.temporal_conv3d import temporal_conv3d_reference

# B, V, C_in, C_out, k, T, H, W: on and off every block size
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 4, 16, 32, 3, 8, 3, 5),
    (1, 8, 3, 64, 5, 7, 4, 3),
    (2, 2, 65, 17, 3, 1, 7, 5),
    (1, 3, 64, 129, 3, 64, 3, 1),
    (3, 1, 33, 64, 1, 2, 9, 9),
    (1, 2, 130, 40, 5, 3, 6, 7),
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_matches_reference(TRITON, REFERENCE, make_inputs(shape, dtype, device, epilogue=False, grad=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue_matches_reference(shape, relu, dtype, device):
    inputs = make_inputs(shape, dtype, device, grad=True)
    assert_matches_reference(partial(TRITON, relu=relu), partial(REFERENCE, relu=relu), inputs)
