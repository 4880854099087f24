"""The CPU path against the eager reference at full width: one clip, one branch, float32.

Each benchmark times the path and, in turns with it, the reference; ``extra_info`` holds the reference's median and the
median of the ratios, so one run shows the speed-up whatever else the machine does.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor

from sdr import SDRModel, ftcn_released
from sdr.fast import SDRModel as FastSDRModel
from sdr.ftcn import STEM_KERNEL, Bottleneck, Stem, res_kernel
from sdr.packing import fold, pack_blocks
from sdr_kernels import bottleneck_chain, temporal_stem

PAIRS = 21
# each stage's first and second block: channels of the input, inner channels, T, H = W, pool
BLOCKS = {
    "res2.0": (64, 64, 32, 56, False),
    "res2.1": (256, 64, 32, 56, False),
    "res3.0": (256, 128, 16, 56, True),
    "res3.1": (512, 128, 16, 28, False),
    "res4.0": (512, 256, 16, 28, True),
    "res4.1": (1024, 256, 16, 14, False),
}


@pytest.fixture(autouse=True)
def two_threads(quiet_cpu):
    """Two, unlike the other benchmarks: the promise is for two cores, and pairs of runs meet the same guests."""
    torch.set_num_threads(2)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Evaluation, with batch norms whose statistics and gammas of either sign do something."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(norm.weight, -0.5, 1)
            torch.nn.init.normal_(norm.bias, std=0.1)
    return module.eval()


@torch.inference_mode()
def time_pairs(benchmark, ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Check the answer, which warms both up, then time reference and path in turns."""
    expected = reference(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    seconds = {reference: [], ours: []}

    def time_reference() -> None:
        start = time.perf_counter()
        reference(x)
        seconds[reference].append(time.perf_counter() - start)

    def time_ours() -> None:
        start = time.perf_counter()
        ours(x)
        seconds[ours].append(time.perf_counter() - start)

    benchmark.pedantic(time_ours, setup=time_reference, rounds=PAIRS)
    ratios = [slow / fast for slow, fast in zip(seconds[reference], seconds[ours], strict=True)]
    benchmark.extra_info.update(
        ratio=median(ratios),
        ratios=sorted(ratios),
        reference_seconds=median(seconds[reference]),
        shape=list(x.shape),
        dtype=str(x.dtype),
        threads=torch.get_num_threads(),
    )


def bench_model(benchmark):
    config = replace(ftcn_released(), num_branches=1)
    if benchmark.disabled:
        config = replace(config, num_frames=4, image_size=32)
    model = randomise(SDRModel(config))
    fast = FastSDRModel.from_reference(model)
    x = torch.randn(1, 3, config.num_frames, config.image_size, config.image_size)
    time_pairs(benchmark, lambda clip: fast(clip).tokens, lambda clip: model(clip).tokens, x)


def bench_stem(benchmark):
    stem = randomise(Stem(64, STEM_KERNEL))
    packed = fold([stem.conv], [stem.bn], torch.float32)
    T, size = (2, 16) if benchmark.disabled else (32, 224)
    x = torch.randn(1, 3, T, size, size)
    time_pairs(benchmark, lambda clip: temporal_stem(clip, *packed, impl="cpu")[:, 0], stem, x)


@pytest.mark.parametrize("block", BLOCKS)
def bench_block(benchmark, block):
    channels, inner, T, size, pool = BLOCKS[block]
    kernel = res_kernel(int(block[3]), int(block[-1]))
    module = randomise(Bottleneck(channels, inner, kernel=kernel, pool=pool))
    packed = pack_blocks([module], torch.float32, time_pool=False)
    if benchmark.disabled:
        T, size = 2, 4
    x = torch.randn(1, channels, T, size, size)
    # the layout that each side's previous block leaves behind
    innermost = x.contiguous(memory_format=torch.channels_last_3d)[:, None]
    time_pairs(benchmark, lambda _: bottleneck_chain(innermost, [packed])[:, 0], module, x)
