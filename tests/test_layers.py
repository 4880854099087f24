"""What the layer model counts is what the reference and the kernels' own ops move and compute."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdr import SDRModel, ftcn_released, paper, tiny
from sdr.config import GroupedConfig
from sdr.ftcn import Backbone, Bottleneck, Stem
from sdr.grouped import GroupedPass
from sdr.layers import distinct, layers_of
from sdr.passes import INFERENCE, passes_of
from sdr.training_passes import TRAINING, saved_bytes, training_passes

H200 = (790e12, 4.3e12)  # FLOP/s in bfloat16 and bytes/s
# every kind of block: with branch1 and without, with each pool and without, with each kernel size
KINDS = replace(tiny(), num_branches=2, num_frames=4, image_size=32, width=8, backbone_stages=3, blocks=(2, 2, 2))


def count_products(module: torch.nn.Module, x: torch.Tensor) -> dict[str, int]:
    """FLOPs of every convolution and linear layer by name, counted by hooks."""
    flops = {}

    def hook(name):
        def count(layer, inputs, output):
            inner = layer.weight[0].numel()
            flops[name] = flops.get(name, 0) + 2 * output.numel() * inner

        return count

    for name, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Conv3d, torch.nn.Linear)):
            layer.register_forward_hook(hook(name))
    with torch.inference_mode():
        module(x)
    return flops


@pytest.mark.parametrize(("preset", "gflop"), [(ftcn_released, 133), (paper, 163)])
def test_backbone_flops_are_those_of_the_reference(preset, gflop):
    config = replace(preset(), num_branches=1)
    with torch.device("meta"):
        counted = count_products(Backbone(config.branch()).eval(), torch.empty(1, 3, 32, 224, 224))
    layers = [x for x in layers_of(config, 1) if x.op in ("temporal_stem", "temporal_bottleneck")]
    for layer in layers:
        of_layer = sum(flops for name, flops in counted.items() if name.startswith(layer.name + "."))
        assert layer.flops == of_layer, layer.name
    assert sum(layer.flops for layer in layers) == sum(counted.values())
    assert round(sum(counted.values()) / 1e9) == gflop


@pytest.mark.parametrize(
    "change", [{}, {"num_branches": 1}, {"joint_feature": "mlp"}, {"joint_feature": "mean"}, {"depth": 2}], ids=str
)
def test_head_flops_are_those_of_the_reference(change):
    config = replace(tiny(), **change)
    clip = torch.zeros(2, 3, config.num_frames, config.image_size, config.image_size)
    counted = count_products(SDRModel(config).eval(), clip)
    linear = sum(flops for name, flops in counted.items() if not name.startswith("branches"))
    layers = [layer for layer in layers_of(config, 2) if layer.op == "norm_linear"]
    assert sum(layer.flops for layer in layers) == linear


def test_backbone_bytes_are_those_of_the_reference():
    """Input, output and weights of every stem and block, and scale and shift of every channel."""
    config = replace(tiny(), num_branches=1, backbone_stages=3, blocks=(2, 1, 2))
    backbone = Backbone(config.branch()).eval()
    counted = {}

    def hook(name):
        def count(module, inputs, output):
            convs = [x for x in module.modules() if isinstance(x, torch.nn.Conv3d)]
            weights = sum(conv.weight.nbytes + 8 * conv.out_channels for conv in convs)
            last = backbone.time_pool(output) if name == "res2.1" else output
            counted[name] = inputs[0].nbytes + last.nbytes + weights

        return count

    for name, module in backbone.named_modules():
        if isinstance(module, (Stem, Bottleneck)):
            module.register_forward_hook(hook(name))
    with torch.inference_mode():
        backbone(torch.zeros(3, 3, config.num_frames, config.image_size, config.image_size))
    layers = layers_of(config, 3, itemsize=4)
    assert {layer.name: layer.bytes for layer in layers if layer.name in counted} == counted


def test_floors_are_those_of_block_fusion():
    """About 12 ms for 16 clips of 4 branches on an H200, of which arithmetic is the larger part."""
    layers = layers_of(ftcn_released(), 16)
    rates = 790e12, 4.3e12
    assert sum(layer.floor(*rates) for layer in layers) == pytest.approx(11.7e-3, rel=0.02)
    bound = {layer.name: layer.bound(*rates) for layer in layers}
    assert (bound["stem"], bound["res2.1"], bound["res3.0"], bound["spatial_mean"]) == (
        "memory",
        "memory",
        "arithmetic",
        "memory",
    )


def test_equal_layers_are_timed_once():
    counts = {layer.name: count for layer, count in distinct(layers_of(ftcn_released(), 1))}
    assert {name: counts[name] for name in ("res2.0", "res2.1", "res2.2", "res3.1", "res4.1", "res4.2")} == {
        "res2.0": 1,
        "res2.1": 1,
        "res2.2": 1,
        "res3.1": 2,
        "res4.1": 3,
        "res4.2": 2,
    }


class Counter(TorchDispatchMode):
    """FLOPs and bytes of what runs inside, each tensor of rows once where it is read and once where it is written."""

    def __init__(self, kernels: bool) -> None:
        super().__init__()
        self.kernels = kernels
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        namespace, _, name = function.name().partition("::")
        if namespace == ("sdr_kernels" if self.kernels else "aten"):
            count = kernel_work if self.kernels else eager_work
            flops, nbytes = count(name.partition(".")[0], args, out)
            self.flops, self.bytes = self.flops + flops, self.bytes + nbytes
        return out


def eager_work(name: str, args: tuple, out) -> tuple[int, int]:
    """Of an op of PyTorch; indices of pools, int64, only where gradients are enabled."""
    first = out[0] if isinstance(out, tuple) else out
    if name == "convolution":
        return 2 * first.numel() * args[1][0].numel(), args[0].nbytes + first.nbytes
    if name == "convolution_backward":
        dz, x, weight = args[:3]
        once = 2 * dz.numel() * weight[0].numel()
        rows = 0 if out[0] is None else dz.nbytes + out[0].nbytes
        return once * (1 if out[0] is None else 2), dz.nbytes + x.nbytes + rows
    if name in ("native_batch_norm", "relu_"):
        return 0, args[0].nbytes + first.nbytes
    if name == "max_pool3d_with_indices":
        return 0, args[0].nbytes + first.nbytes + torch.is_grad_enabled() * out[1].nbytes
    if name == "max_pool3d_with_indices_backward":
        return 0, args[0].nbytes + out.nbytes + args[-1].nbytes
    if name in ("native_batch_norm_backward", "threshold_backward", "add"):
        return 0, args[0].nbytes + args[1].nbytes + first.nbytes
    return 0, 0


def kernel_work(name: str, args: tuple, out) -> tuple[int, int]:
    """Of a private op of :mod:`sdr_kernels`: rows have six axes, in memory or as a clip."""
    results = out if isinstance(out, tuple) else (out,)
    tensors = [a for a in args if isinstance(a, Tensor)]
    nbytes = sum(t.nbytes for t in (*tensors, *results) if t.ndim == 6)
    x = args[0]
    rows = x.numel() // x.shape[-1]
    if name in ("conv_moments", "conv_norm"):
        weight = args[3]
        return 2 * rows * weight[0].numel(), nbytes
    if name == "row_products":
        return 2 * rows * out[0][0].numel(), nbytes
    if name == "covariance":
        return 2 * rows * x.shape[-1] ** 2, nbytes
    if name == "conv_grad":
        rows, matrix = out[0].numel() // out[0].shape[-1], args[11]
        return 2 * rows * (args[7][0].numel() + (0 if matrix is None else matrix[0].numel())), nbytes
    pixels = x.numel() // x.shape[2]
    if name == "patch_covariance":
        return 2 * pixels * (x.shape[2] * args[1]) ** 2, nbytes
    if name == "stem_max":
        return 2 * pixels * args[1][0].numel(), nbytes
    if name == "stem_products":
        return 2 * args[1].numel() * out[0].shape[-1], nbytes
    return 0, nbytes


def clip_of(config) -> Tensor:
    return torch.randn(3, config.num_branches, 3, config.num_frames, config.image_size, config.image_size)


def backbones_of(config) -> list[Backbone]:
    return [Backbone(config.branch()) for _ in range(config.num_branches)]


def test_passes_of_an_eager_network_are_what_pytorch_runs():
    views = clip_of(KINDS)
    with torch.no_grad(), Counter(kernels=False) as counter:  # in inference mode convolutions are not taken apart
        for v, backbone in enumerate(backbones_of(KINDS)):
            backbone.eval()(views[:, v])
    passes = passes_of(KINDS, len(views), "eager", itemsize=4)
    assert (counter.flops, counter.bytes) == (sum(p.flops for p in passes), sum(p.bytes for p in passes))


@pytest.mark.parametrize("scheme", TRAINING)
def test_passes_of_training_are_what_runs(scheme):
    views, branches = clip_of(KINDS), backbones_of(KINDS)
    with Counter(kernels=scheme != "eager") as counter:
        if scheme == "eager":
            features = torch.stack([b(views[:, v]) for v, b in enumerate(branches)])
        else:
            features = GroupedPass(branches, GroupedConfig(scheme=scheme, impl="cpu")).tokens(views)
        features.sum().backward()
    passes = training_passes(KINDS, len(views), scheme, itemsize=4)
    assert (counter.flops, counter.bytes) == (sum(p.flops for p in passes), sum(p.bytes for p in passes))


@pytest.mark.parametrize("scheme", TRAINING)
def test_kept_bytes_are_what_autograd_saves(scheme):
    """Of a batch of 3 less that of 2: what grows with it."""
    branches, found = backbones_of(KINDS), []
    for clips in (2, 3):
        views = clip_of(KINDS)[:clips].clone()
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if scheme == "eager":
                out = [b(views[:, v].clone()) for v, b in enumerate(branches)]
            else:
                out = GroupedPass(branches, GroupedConfig(scheme=scheme, impl="cpu")).tokens(views)
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        del out
    assert found[1] - found[0] == sum(saved_bytes(KINDS, scheme, itemsize=4).values())


# microseconds of 1 clip and 4 branches, from an independent count that leaves out the pool over time
@pytest.mark.parametrize(
    ("plan", "floor_us"), list(zip(INFERENCE, (4454, 2540, 1838, 1230, 749), strict=True)), ids=INFERENCE
)
def test_floors_of_inference(plan, floor_us):
    passes = [p for p in passes_of(ftcn_released(), 1, plan) if p.what != "pool over time"]
    found = 1e6 * sum(p.floor(*H200) for p in passes)
    if plan in ("convolution", "block"):  # where it is no pass of its own, it halves what is written
        found += 1e6 * 4 * 256 * 16 * 56**2 * 2 / H200[1]
    assert found == pytest.approx(floor_us, rel=0.005)


def test_floors_of_training():
    """Milliseconds of 16 clips: as our schemes are written, and with both products of a gradient in one pass."""

    def floor_ms(scheme, **options):
        return 1e3 * sum(p.floor(*H200) for p in training_passes(ftcn_released(), 16, scheme, **options))

    assert floor_ms("fused", merged=True) == pytest.approx(82, rel=0.02)  # an independent count
    assert floor_ms("gram", merged=True) < floor_ms("gram") < floor_ms("fused") < floor_ms("eager")
    for scheme in ("fused", "gram"):
        apart, merged = (training_passes(ftcn_released(), 16, scheme, merged=m) for m in (False, True))
        assert sum(p.flops for p in apart) == sum(p.flops for p in merged)


def test_kept_bytes_of_the_published_model():
    gigabytes = {s: sum(saved_bytes(ftcn_released(), s).values()) / 1e9 for s in TRAINING}
    assert gigabytes["fused"] == pytest.approx(3.2, rel=0.05)
    assert gigabytes["gram"] == pytest.approx(1.4, rel=0.07)


@pytest.mark.parametrize("call", [lambda: passes_of(tiny(), 1, "magic"), lambda: saved_bytes(tiny(), "magic")])
def test_rejects_a_plan_that_there_is_not(call):
    with pytest.raises(ValueError, match="must be one of eager, "):
        call()
