"""Forward pass of the reference model: the baseline of every kernel to come."""

import pytest
import torch

from sdr import SDRModel, tiny
from sdr.ftcn import STEM_KERNEL, Bottleneck, Stem, res_kernel

# input of each stage's second block for one clip: channels, T, H = W
STAGES = {"res2": (256, 32, 56), "res3": (512, 16, 28), "res4": (1024, 16, 14), "res5": (2048, 16, 7)}
LAYOUTS = {"NCTHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def flops_of(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Twice the multiply-adds of all convolutions, counted by hooks."""
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        total += 2 * output.numel() * conv.in_channels * conv.kernel_size[0]

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, torch.nn.Conv3d)]
    module(x)
    for hook in hooks:
        hook.remove()
    return total


@torch.inference_mode()
def time_forward(benchmark, module: torch.nn.Module, x: torch.Tensor) -> None:
    """Check that the output is finite, record FLOPs and bytes, time the forward pass."""
    benchmark.extra_info.update(
        flops=flops_of(module, x),
        input_bytes=x.nbytes,
        weight_bytes=sum(p.nbytes for p in module.parameters()),
        shape=list(x.shape),
        dtype=str(x.dtype),
    )
    output = benchmark.pedantic(module, args=(x,), rounds=5, warmup_rounds=1)
    assert all(value.isfinite().all() for value in (output if isinstance(output, tuple) else (output,)))


@pytest.mark.parametrize("batch", [1, 4])
def bench_tiny_forward(benchmark, batch):
    config = tiny()
    x = torch.randn(batch, 3, config.num_frames, config.image_size, config.image_size)
    time_forward(benchmark, SDRModel(config).eval(), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def bench_block_forward(benchmark, stage, layout):
    channels, frames, size = STAGES[stage]
    kernel = res_kernel(int(stage[-1]), 1)
    block = Bottleneck(channels, channels // 4, kernel=kernel, pool=False).eval()
    x = torch.randn(1, channels, frames, size, size).contiguous(memory_format=LAYOUTS[layout])
    time_forward(benchmark, block.to(memory_format=LAYOUTS[layout]), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_stem_forward(benchmark, layout):
    stem = Stem(64, STEM_KERNEL).eval().to(memory_format=LAYOUTS[layout])
    x = torch.randn(1, 3, 32, 224, 224).contiguous(memory_format=LAYOUTS[layout])
    time_forward(benchmark, stem, x)
