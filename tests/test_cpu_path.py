"""The CPU's stem and bottleneck against FTCN's own modules in float64."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference
from torch.utils._python_dispatch import TorchDispatchMode

from sdr.ftcn import Bottleneck, Stem
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, standardise
from sdr_kernels._cpu import temporal_bottleneck as cpu_bottleneck
from sdr_kernels._cpu import temporal_stem as cpu_stem
from sdr_kernels._cpu.temporal_bottleneck import bottleneck_chain_fwd, temporal_bottleneck_fwd
from sdr_kernels._cpu.temporal_stem import temporal_stem_fwd
from sdr_kernels._ops import DTYPES
from sdr_kernels.temporal_bottleneck import FoldedConv, temporal_bottleneck_reference
from sdr_kernels.temporal_stem import temporal_stem_reference

pytestmark = pytest.mark.promise(row="absent parts")

# B, V, C, k, T, H, W, a clip per branch
STEMS = [
    (1, 1, 4, 1, 1, 2, 2, False),
    (2, 2, 8, 5, 4, 9, 7, False),
    (2, 3, 5, 5, 1, 6, 11, True),
    (1, 2, 33, 3, 5, 13, 3, True),
    (2, 1, 16, 5, 7, 34, 37, False),
    (0, 2, 8, 5, 4, 8, 8, True),
]
# B, V, C_in, inner, k, T, H, W, and which of pool and time_pool; branch1 is there where C_in is not 4 * inner
BLOCKS = [
    (1, 1, 4, 1, 1, 1, 1, 1, ""),
    (2, 3, 32, 8, 3, 5, 3, 5, ""),
    (1, 2, 16, 16, 5, 1, 7, 5, ""),
    (1, 2, 16, 16, 5, 2, 1, 4, ""),
    (2, 2, 24, 8, 3, 2, 5, 4, "pool"),
    (1, 1, 64, 16, 3, 9, 1, 3, "time_pool"),
    (1, 3, 20, 40, 1, 4, 5, 7, "pool time_pool"),
    (1, 1, 96, 65, 3, 7, 9, 2, "pool time_pool"),
    (1, 2, 128, 16, 3, 3, 2, 3, ""),
    (1, 1, 128, 32, 3, 4, 3, 2, "time_pool"),
    (2, 1, 160, 24, 3, 11, 5, 3, "pool"),
    (1, 1, 256, 64, 3, 33, 2, 1, ""),
    (1, 1, 512, 128, 3, 16, 4, 8, ""),
    (1, 1, 1024, 192, 3, 5, 2, 2, "pool"),
    (1, 1, 128, 8, 3, 1, 2, 2, ""),
    (1, 1, 1024, 512, 3, 4, 4, 8, "pool"),
    (1, 2, 2048, 512, 1, 5, 4, 4, ""),
    (0, 2, 8, 8, 3, 4, 2, 2, "pool"),
]
MEMORY = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.movedim(-4, -1).contiguous().movedim(-1, -4),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def randomise(module, dtype):
    """Float64, evaluation, weights that ``dtype`` holds, batch norms of random statistics and gammas of both signs."""
    for layer in module.double().eval().modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.weight.data = layer.weight.data.to(dtype).double()
        elif isinstance(layer, torch.nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.normal_()
            layer.bias.data.normal_()
    return module


def fold(convs, norms, dtype):
    """Weight, scale and shift of all branches, as the launchers take them."""
    weight = torch.stack([conv.weight.data[..., 0, 0] for conv in convs])
    scale = torch.stack([norm.weight.data * (norm.running_var + norm.eps).rsqrt() for norm in norms])
    shift = torch.stack([norm.bias.data - norm.running_mean * s for norm, s in zip(norms, scale, strict=True)])
    return [weight.to(dtype), scale.float(), shift.float()]


def make_stem(shape, dtype):
    """Modules of V branches in float64, and the inputs of a launcher."""
    B, V, C, k, T, H, W, per_branch = shape
    modules = [randomise(Stem(C, k), dtype) for _ in range(V)]
    x = torch.randn((B, V, 3, T, H, W) if per_branch else (B, 3, T, H, W)).to(dtype)
    return modules, [x, *fold([m.conv for m in modules], [m.bn for m in modules], dtype)]


def run_stem(x, weight, scale, shift):
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if x.dtype == torch.uint8 else (None, None)
    return temporal_stem_fwd(x, weight, scale, shift, mean, std)


def stem_truth(modules, x, weight, scale, shift):
    """The modules where the inputs are wide, else the plain op."""
    if weight.dtype != torch.float64:
        normalise = (IMAGENET_MEAN, IMAGENET_STD) if x.dtype == torch.uint8 else None
        return temporal_stem_reference(x, weight, scale, shift, normalise)
    if x.dtype == torch.uint8:
        x = standardise(x.double() / 255)
    return torch.stack([m(x[:, v] if x.ndim == 6 else x) for v, m in enumerate(modules)], dim=1)


def assert_stem(modules, inputs):
    with torch.no_grad():
        assert_matches_reference(run_stem, partial(stem_truth, modules), inputs)


def make_bottleneck(shape, dtype):
    """Modules of V branches in float64, and the tensors of a launcher; branch1's may be missing."""
    B, V, C_in, inner, k, T, H, W, flags = shape
    options = {"kernel": k, "pool": flags.startswith("pool")}
    modules = [randomise(Bottleneck(C_in, inner, **options), dtype) for _ in range(V)]
    inputs = [torch.randn(B, V, C_in, T, H, W).to(dtype)]
    for name in ["a", "b", "c"] + ["branch1"] * modules[0].has_branch1:
        convs, norms = ([getattr(m, name + suffix) for m in modules] for suffix in ("", "_bn"))
        inputs += fold(convs, norms, dtype)
    return modules, inputs


def run_bottleneck(flags, x, *layers):
    layers = [*layers, None, None, None][:12]
    return temporal_bottleneck_fwd(x, *layers, flags.startswith("pool"), "time_pool" in flags)


def bottleneck_truth(flags, modules, x, *layers):
    """The modules where the inputs are wide, else the plain op."""
    if x.dtype != torch.float64:
        layers = [FoldedConv(*layers[i : i + 3]) for i in range(0, len(layers), 3)]
        return temporal_bottleneck_reference(x, *layers, pool=flags.startswith("pool"), time_pool="time_pool" in flags)
    out = [m(x[:, v]) for v, m in enumerate(modules)]
    if "time_pool" in flags:
        out = [torch.nn.functional.max_pool3d(y, (2, 1, 1)) for y in out]
    return torch.stack(out, dim=1)


def assert_bottleneck(flags, modules, inputs):
    with torch.no_grad():
        assert_matches_reference(partial(run_bottleneck, flags), partial(bottleneck_truth, flags, modules), inputs)


@pytest.mark.parametrize("shape", STEMS, ids=str)
def test_stem_equals_the_module(shape, dtype):
    assert_stem(*make_stem(shape, dtype))


@pytest.mark.parametrize("shape", STEMS, ids=str)
def test_stem_of_uint8(shape, dtype):
    modules, (x, *layer) = make_stem(shape, dtype)
    assert_stem(modules, [torch.randint(0, 256, x.shape, dtype=torch.uint8), *layer])


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_bottleneck_equals_the_module(shape, dtype):
    assert_bottleneck(shape[-1], *make_bottleneck(shape, dtype))


@pytest.mark.parametrize("size", [1, 2000], ids=["smallest", "uneven"])
@pytest.mark.parametrize("shape", [STEMS[1], STEMS[4]], ids=str)
def test_stem_in_bands(shape, size, monkeypatch):
    monkeypatch.setattr(cpu_stem, "BAND_BYTES", size * shape[2])
    assert_stem(*make_stem(shape, torch.float32))


@pytest.mark.parametrize("shape", [STEMS[1], STEMS[4]], ids=str)
def test_stem_in_groups_of_frames(shape, monkeypatch):
    monkeypatch.setattr(cpu_stem, "GROUP", 3)
    assert_stem(*make_stem(shape, torch.float32))


@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory_layout(memory, dtype):
    modules, (x, *layer) = make_stem(STEMS[2], dtype)
    layer = [tensor.repeat_interleave(2, 0)[::2] for tensor in layer]
    assert_stem(modules, [MEMORY[memory](x), *layer])
    shape = BLOCKS[4]
    modules, (x, *layers) = make_bottleneck(shape, dtype)
    layers = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in layers]
    assert_bottleneck(shape[-1], modules, [MEMORY[memory](x), *layers])


def test_nan_and_infinity_stay_where_they_belong(dtype):
    modules, (x, *layer) = make_stem(STEMS[4], dtype)
    x[0, 1, 2, 5, 6], x[1, 0, 0, 8, 30] = float("nan"), float("inf")
    assert_stem(modules, [x, *layer])
    for shape in (BLOCKS[1], BLOCKS[4], BLOCKS[5], BLOCKS[6], BLOCKS[10]):
        modules, (x, *layers) = make_bottleneck(shape, dtype)
        x[0, 0, 3, 1, 0, 1], x[-1, -1, 0, 0, 0, 2] = float("nan"), float("inf")
        assert_bottleneck(shape[-1], modules, [x, *layers])


def test_scales_may_be_in_the_weights(dtype):
    shape = BLOCKS[4]
    _, (x, *layers) = make_bottleneck(shape, torch.float32)
    scales = layers[1::3]
    folded = [weight * scale[..., None, None] for weight, scale in zip(layers[::3], scales, strict=True)]
    layers[::3], layers[1::3] = [weight.to(dtype) for weight in folded], [None] * len(scales)
    ones = [torch.ones_like(scale) for scale in scales]
    apart = [tensor for layer in zip(layers[::3], ones, layers[2::3], strict=True) for tensor in layer]
    x = x.to(dtype)
    assert torch.equal(run_bottleneck("pool", x, *layers), run_bottleneck("pool", x, *apart))


def test_channels_are_innermost_in_memory(dtype):
    _, inputs = make_stem(STEMS[1], dtype)
    _, block = make_bottleneck(BLOCKS[4], dtype)
    for out in (run_stem(*inputs), run_bottleneck("pool", *block)):
        assert out.movedim(2, -1).is_contiguous()


@pytest.mark.parametrize("threads", [1, 2])
def test_repeatable(threads, dtype):
    torch.set_num_threads(threads)
    _, inputs = make_stem((2, 2, 16, 5, 4, 34, 37, False), dtype)
    _, block = make_bottleneck((2, 2, 64, 32, 3, 6, 14, 14, "pool time_pool"), dtype)
    stem, bottleneck = run_stem(*inputs), run_bottleneck("pool time_pool", *block)
    for _ in range(3):
        assert torch.equal(run_stem(*inputs), stem)
        assert torch.equal(run_bottleneck("pool time_pool", *block), bottleneck)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest memory that any op's result lives in."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:  # packed weights, which have no storage
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def test_stem_never_holds_a_frame_at_full_resolution(dtype):
    _, inputs = make_stem((1, 1, 256, 5, 2, 160, 160, False), dtype)
    with LargestTensor() as largest:
        run_stem(*inputs)
    assert largest.nbytes == 4 * 256 * 80 * 80  # pooled once


def test_chain_never_holds_a_whole_intermediate():
    _, (x, *wide) = make_bottleneck((1, 1, 64, 64, 3, 8, 32, 32, ""), torch.float32)
    _, (between, *pooled) = make_bottleneck((1, 1, 256, 32, 3, 8, 32, 32, "pool"), torch.float32)
    with LargestTensor() as largest:
        out = bottleneck_chain_fwd(x, [*wide, *pooled], [False, True], [False, False])
    assert largest.nbytes == max(x.nbytes, out.nbytes) < between.nbytes


@pytest.mark.parametrize("frames", range(2, 10))
def test_winograd_equals_the_convolution(frames):
    """Directly: what it leaves unwritten would be NaN here, and computed again tap by tap."""
    taps = torch.randn(3, 24, 40, dtype=torch.float64)
    layer = cpu_bottleneck._Layer(taps, torch.randn(24, dtype=torch.float64), cpu_bottleneck._winograd_factors(taps))
    x = torch.randn(frames, 3, 2, 40, dtype=torch.float64)
    torch.testing.assert_close(cpu_bottleneck._winograd_relu(x, layer), cpu_bottleneck._convolve(x, layer).relu_())


@pytest.mark.parametrize("frame", range(6))
def test_a_frame_is_not_rounded_by_those_it_does_not_depend_on(frame):
    _, (x, *layers) = make_bottleneck((1, 1, 256, 64, 3, 6, 2, 2, ""), torch.float32)
    near = slice(max(0, frame - 1), frame + 2)
    before = run_bottleneck("", x, *layers)
    x[:, :, :, frame] *= 1e7
    after = run_bottleneck("", x, *layers)
    before[:, :, :, near] = after[:, :, :, near] = 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 7])
def test_infinity_may_meet_infinity(frames):
    """In Winograd's differences it does, where in the definition it does not."""
    identity = torch.eye(128).view(1, 128, 128, 1) + 1  # no weight is 0, whose product with infinity would be NaN
    taps = torch.ones(1, 128, 128, 3)
    taps[..., 1] = identity[..., 0]
    layer = [None, torch.zeros(1, 128)]
    x = torch.zeros(1, 1, 128, frames, 1, 1)
    x[:, :, 5, :2] = float("inf")
    out = temporal_bottleneck_fwd(x, taps, *layer, identity, *layer, identity, *layer, None, None, None, False, False)
    truth = temporal_bottleneck_reference(x, *(FoldedConv(w, *layer) for w in (taps, identity, identity)))
    assert truth.isinf().any()
    assert not truth.isnan().any()
    assert torch.equal(out, truth)
