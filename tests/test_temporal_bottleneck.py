"""temporal_bottleneck against float64, the model's own blocks, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference

from sdr_kernels import temporal_bottleneck
from sdr_kernels.temporal_bottleneck import temporal_bottleneck_reference

# B, V, C_in, inner, C_out, k, T, H, W, and which of branch1, pool, time_pool
SHAPES = [
    (1, 1, 4, 1, 4, 1, 1, 1, 1, ""),
    (2, 3, 32, 8, 32, 3, 5, 3, 5, ""),
    (1, 2, 16, 16, 48, 5, 4, 7, 5, "branch1"),
    (1, 8, 24, 8, 32, 3, 2, 5, 4, "branch1 pool"),
    (1, 1, 64, 16, 64, 3, 64, 1, 3, "time_pool"),
    (2, 1, 16, 33, 40, 3, 7, 3, 2, "branch1 time_pool"),
    (1, 2, 20, 40, 24, 1, 3, 5, 7, "branch1 pool time_pool"),
    (1, 1, 96, 72, 96, 3, 3, 7, 9, ""),
    (1, 1, 40, 136, 70, 3, 2, 9, 6, "branch1 pool"),
    (0, 2, 8, 8, 8, 3, 4, 2, 2, ""),
]


def make_inputs(shape, dtype, device):
    """x and the flat (weight, scale, shift) of a, b, c and perhaps branch1; every gamma sign occurs."""
    B, V, C_in, inner, C_out, k, T, H, W, flags = shape
    inputs = [torch.randn(B, V, C_in, T, H, W, device=device).to(dtype)]
    layers = [(inner, C_in, k), (inner, inner, 1), (C_out, inner, 1)] + [(C_out, C_in, 1)] * ("branch1" in flags)
    for rows, columns, kernel in layers:
        weight = torch.randn(V, rows, columns, kernel, device=device) / (columns * kernel) ** 0.5
        inputs += [weight.to(dtype), torch.randn(V, rows, device=device), torch.randn(V, rows, device=device) / 2]
    return inputs


def run(function, flags, x, *layers, **options):
    convs = [layers[i : i + 3] for i in range(0, len(layers), 3)]
    return function(x, *convs, pool="pool" in flags.split(), time_pool="time_pool" in flags, **options)


def run_reference(flags, x, *layers):
    from sdr_kernels import FoldedConv

    convs = [FoldedConv(*layers[i : i + 3]) for i in range(0, len(layers), 3)]
    return temporal_bottleneck_reference(x, *convs, pool="pool" in flags.split(), time_pool="time_pool" in flags)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    function = partial(run, temporal_bottleneck, shape[-1], impl="triton")
    assert_matches_reference(function, partial(run_reference, shape[-1]), make_inputs(shape, dtype, device))
