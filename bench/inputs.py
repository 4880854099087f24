"""Models and inputs of the GPU run: random, but with no dead branch and no value out of range."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sdr import SDRConfig, SDRModel
from sdr.ftcn import Bottleneck
from sdr.layers import Layer, Linear, Shape

SEED = 0


def mapped(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """The same tuples, named tuples, lists and dicts with every tensor replaced by what ``function`` makes of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(part, function) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


@torch.no_grad()
def random_model(config: SDRConfig, device: torch.device) -> SDRModel:
    """A reference model in float32 whose batch norms hold the statistics of its own activations, moved at random.

    Gammas have both signs and the c-BNs', which start at zero, are drawn too, so that every branch carries a signal.
    """
    generator = torch.Generator().manual_seed(SEED)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(device)

    torch.manual_seed(SEED)
    with device:
        model = SDRModel(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            sign = torch.where(uniform(module.weight, 0, 1) < 0.1, -1.0, 1.0)
            module.weight.copy_(uniform(module.weight, 0.5, 1.5) * sign)
            module.bias.copy_(uniform(module.bias, -0.5, 0.5))
            module.momentum = None  # the first batch's statistics as they are
            module.train()
        if isinstance(module, Bottleneck):
            module.c_bn.weight.mul_(0.5)
    clip = random_views(config, 1, device)[:, 0]
    for branch in model.branches:
        branch(clip)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 0.1
            module.running_mean.add_(uniform(module.running_mean, -0.1, 0.1) * module.running_var.sqrt())
            module.running_var.mul_(uniform(module.running_var, 0.8, 1.25))
            module.num_batches_tracked.zero_()
    return model.eval()


def random_views(config: SDRConfig, clips: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, V, 3, T, H, W], a clip per branch, channels innermost in memory, as decoded frames have them."""
    shape = (clips, config.num_branches, config.num_frames, config.image_size, config.image_size, 3)
    generator = torch.Generator(device).manual_seed(SEED)
    if dtype == torch.uint8:
        views = torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
    else:
        views = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return views.movedim(-1, 2)


def random_rows(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, V, C, T, H, W] of this shape, channels innermost in memory."""
    B, V, C, T, H, W = shape
    return torch.randn(B, V, T, H, W, C, device=device, dtype=dtype).movedim(-1, 2)


def folded(V: int, C_out: int, C_in: int, k: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weight, [V, C_out, C_in, k], and float32 scale and shift, [V, C_out]; scales have both signs."""
    weight = torch.randn(V, C_out, C_in, k, device=device) / (C_in * k) ** 0.5
    scale = torch.randn(V, C_out, device=device)
    return weight.to(dtype), scale, torch.randn(V, C_out, device=device)


def packed(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same with the weight in the kernels' own memory order, [V, k, C_in, C_out], as a model keeps it."""
    weight, *rest = weights
    return weight.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), *rest


def bottleneck_inputs(s: Shape, clips: int, V: int, device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Positional and named arguments of ``temporal_bottleneck`` for a block of these sizes."""
    sizes = [(s.inner, s.C_in, s.kernel), (s.inner, s.inner, 1), (s.C_out, s.inner, 1)]
    if s.branch1:
        sizes.append((s.C_out, s.C_in, 1))
    weights = [packed(folded(V, *size, device, dtype)) for size in sizes]
    x = random_rows((clips, V, s.C_in, s.T, s.H, s.H), device, dtype)
    return (x, *weights), {"pool": s.pool, "time_pool": s.time_pool}


def stem_inputs(s: Shape, clips: int, V: int, device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Positional and named arguments of ``temporal_stem``."""
    x = random_rows((clips, V, s.C_in, s.T, s.H, s.H), device, dtype)
    return (x, *packed(folded(V, s.C_out, s.C_in, s.kernel, device, dtype))), {}


def linear_inputs(s: Linear, device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Positional and named arguments of ``norm_linear``."""
    x, residual = (torch.randn(s.rows, width, device=device, dtype=dtype) for width in (s.K, s.N))
    weight = (torch.randn(s.N, s.K, device=device) / s.K**0.5).to(dtype)
    gamma, beta, bias = (torch.randn(width, device=device) for width in (s.K, s.K, s.N))
    named = {"activation": s.activation}
    if s.norm:
        named["norm"] = gamma, beta, 1e-5
    if s.residual:
        named["residual"] = residual
    return (x, weight, bias), named


def layer_inputs(
    layer: Layer, config: SDRConfig, clips: int, device: torch.device, dtype: torch.dtype
) -> tuple[tuple, dict]:
    """Positional and named arguments of a layer's op."""
    V, shape = config.num_branches, layer.shape
    if layer.op == "temporal_stem":
        return stem_inputs(shape, clips, V, device, dtype)
    if layer.op == "temporal_bottleneck":
        return bottleneck_inputs(shape, clips, V, device, dtype)
    if layer.op == "norm_linear":
        return linear_inputs(shape, device, dtype)
    if layer.op == "token_attention":
        qkv = torch.randn(shape.clips, shape.tokens, 3 * shape.heads * shape.head_dim, device=device, dtype=dtype)
        return (qkv, shape.heads), {}
    side = config.image_size // 2 ** (config.backbone_stages + 1)
    size = clips, V, config.backbone_channels, config.num_tokens, side, side
    return (random_rows(size, device, dtype),), {}
