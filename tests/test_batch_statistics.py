"""How near batch statistics are to float64: nearer than eager's in bfloat16, and what large means cost."""

import pytest
import torch
from torch import Tensor

from sdr_kernels import NormedBottleneck, NormedConv, Statistics, normed_bottleneck, normed_stem
from sdr_kernels.temporal_conv3d import conv3d_branches

ROWS = 2, 8, 16, 16  # B, T, H, W: enough that a mean over rows is one


def conv(x: Tensor, C_out: int, C_in: int, k: int = 1) -> NormedConv:
    """A layer for the branches, dtype and device of x."""
    V, device = x.shape[1], x.device
    weight = (torch.randn(V, C_out, C_in, k, device=device) / (C_in * k) ** 0.5).to(x.dtype)
    return NormedConv(weight, torch.ones(V, C_out, device=device), torch.zeros(V, C_out, device=device))


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, V, C, T, H, W], in its dtype or float32, as PyTorch's batch norm takes them."""
    var, mean = torch.var_mean(z if z.dtype == torch.float64 else z.float(), (0, 3, 4, 5), correction=0)
    return mean, var


def errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Root mean square errors of mean and variance, in units of the deviation and the variance."""
    (mean, var), (exact_mean, exact_var) = found, truth
    off = (mean - exact_mean) / exact_var.sqrt(), (var - exact_var) / exact_var
    return tuple(each.double().square().mean().sqrt().item() for each in off)


def of_branch1(x: Tensor, layer: NormedConv, **options) -> Statistics:
    """Statistics of a pointwise convolution of x, which is what branch1 is."""
    C_out, C_in = layer.weight.shape[1:3]
    block = NormedBottleneck(conv(x, 4, C_in), conv(x, 4, 4), conv(x, C_out, 4), layer)
    return normed_bottleneck(x, block, **options).statistics[3]


def test_gram_is_50_times_nearer_than_bf16_eager():
    """Rows like those behind a ReLU; the CPU's own products of bfloat16 are those of a tensor core, in float32."""
    B, T, H, W = ROWS
    x = torch.randn(B, 2, 64, T, H, W).relu().bfloat16()
    layer = conv(x, 96, 64)
    truth = moments(conv3d_branches(x.double(), layer.weight.double()))
    eager = errors(moments(conv3d_branches(x, layer.weight)), truth)
    ours = errors(of_branch1(x, layer, scheme="gram", impl="cpu")[:2], truth)
    assert all(error <= limit / 50 for error, limit in zip(ours, eager, strict=True)), (ours, eager)


def test_stem_is_50_times_nearer_than_bf16_eager():
    B, T, H, W = ROWS
    x = torch.randn(B, 2, 3, T, 2 * H, 2 * W).bfloat16()
    layer = conv(x, 32, 3, 5)
    truth = moments(conv3d_branches(x.double(), layer.weight.double()))
    eager = errors(moments(conv3d_branches(x, layer.weight)), truth)
    ours = errors(normed_stem(x, layer, impl="cpu").statistics[0][:2], truth)
    assert all(error <= limit / 50 for error, limit in zip(ours, eager, strict=True)), (ours, eager)


def test_fused_statistics_are_those_of_the_rounded_rows():
    """What the norm will read: to float32's last digits, where bfloat16's own statistics have three."""
    B, T, H, W = ROWS
    x = torch.randn(B, 2, 32, T, H, W).bfloat16()
    layer = conv(x, 24, 32)
    z = conv3d_branches(x.float(), layer.weight.float()).bfloat16()
    found = of_branch1(x, layer, scheme="fused", impl="cpu")
    assert max(errors(found[:2], moments(z.double()))) < 1e-5
    norm = torch.nn.BatchNorm3d(24, momentum=1.0).bfloat16().train()
    norm(z[:, 0])
    eager = (norm.running_mean - moments(z.double())[0][0]).abs().max()
    assert (found.mean[0] - moments(z.double())[0][0]).abs().max() < eager / 50


@pytest.mark.parametrize("ratio", [1, 10, 100, 1000])
def test_large_means_in_gram(ratio, dtype, device):
    """float16 keeps the stated limit, 4 u (h |W|)^2; float32, with products in float64, as good as loses nothing."""
    x = (ratio + torch.randn(1, 1, 32, 4, 8, 8, device=device)).to(dtype)
    layer = conv(x, 16, 32)
    exact_mean, exact_var = moments(conv3d_branches(x.double(), layer.weight.double()))
    found = of_branch1(x, layer, scheme="gram", impl="triton")
    absolute = moments(conv3d_branches(x.double().abs(), layer.weight.double().abs()))[0]
    limit = 4 * torch.finfo(torch.float32).eps * absolute.square()
    if dtype == torch.float32:
        limit = 1e-5 * exact_var
    assert ((found.var - exact_var).abs() <= limit).all()
    assert ((found.mean - exact_mean).abs() <= 1e-6 * absolute).all()


@pytest.mark.parametrize("ratio", [1, 1000])
def test_large_means_cost_fused_nothing(ratio, dtype, device):
    x = (ratio + torch.randn(1, 1, 32, 4, 8, 8, device=device)).to(dtype)
    layer = conv(x, 16, 32)
    z = conv3d_branches(x.float(), layer.weight.float()).to(dtype)
    found = of_branch1(x, layer, scheme="fused", impl="triton")
    # the kernel's own products round otherwise where float32 sums nearly tie between two float16
    assert max(errors(found[:2], moments(z.double()))) < (1e-4 if dtype == torch.float32 else 2e-3)


def test_constant_channels_have_no_variance(dtype, device):
    """Exactly 0 in scheme F; in G at most what the limit allows, which eps outweighs."""
    x = torch.full((1, 1, 16, 4, 5, 5), 1.3, device=device).to(dtype)
    layer = conv(x, 16, 16)
    assert of_branch1(x, layer, scheme="fused", impl="triton").var.count_nonzero() == 0
    assert of_branch1(x, layer, scheme="gram", impl="triton").var.max() < 1e-5


def test_by_hand():
    """Rows 0, 3, 6 have mean 3 and variance 6; a weight of 2 doubles and quadruples them."""
    x = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 1, 3, 1, 1)
    layer = NormedConv(torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1), torch.zeros(1, 1))
    for scheme in ("gram", "fused"):
        found = of_branch1(x, layer, scheme=scheme, impl="cpu")
        assert (found.mean.item(), found.var.item(), found.rows) == (6, 24, 3)
