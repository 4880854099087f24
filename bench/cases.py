"""Every public op of sdr_kernels at the sizes that the model has: calls, inputs, and what there is to do at least."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from answers import Call, clip_by_clip
from inputs import folded, layer_inputs, packed, random_rows, tensors_of
from losses import batch, rows
from machine import SMALL
from timing import Moved
from torch import Tensor
from views import VIEWS, decoded_clips, maps_of

import sdr_kernels
from sdr import SDRConfig, ftcn_released, paper
from sdr.layers import Layer, Work, distinct, layers_of, shapes_of
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD
from sdr.training_passes import training_passes
from sdr_kernels._ops import COMPOSED, GPU_ORDER
from sdr_kernels.info import choice, op_of

CHAIN = ("res3", "res4")  # stages; bench_model has all of them
CONV = "res3.2"  # whose a is timed on its own: a kernel of 3 on 512 channels
# blocks of training: on a CPU those whose eager step ends soon
TRAINED = {"cuda": ("res2.0", "res2.1", "res3.0", "res3.1", "res4.0", "res4.1"), "cpu": ("res3.1", "res4.1")}
TRAINED_CLIPS = {"cuda": 4, "cpu": 1}  # float64 keeps ten times a block's input
TRAINED_FRAMES = 8  # on a CPU
BATCHES = {"cuda": (16, 1), "cpu": (1,)}
LOSS_ROWS = {"cuda": 16_384, "cpu": 2_048}


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Args:
        kind: of device: "cuda" has the paper's batch and all branches, "cpu" one clip and few branches.
        small: tiny ones, for a check.
    """

    kind: str
    small: bool

    def config(self, preset: str = "ftcn_released") -> SDRConfig:
        config = paper() if preset == "paper" else ftcn_released()
        if self.kind == "cpu":
            config = replace(config, num_branches=2 if preset == "paper" else 1)
        tiny = {name: value for name, value in SMALL.items() if name not in ("blocks", "num_branches")}
        return replace(config, **tiny) if self.small else config

    def trained(self) -> SDRConfig:
        """Of what trains: on a CPU short clips, whose gradients in float64 end soon."""
        config = self.config()
        return replace(config, num_frames=TRAINED_FRAMES) if self.kind == "cpu" and not self.small else config

    def of(self, real: int, small: int) -> int:
        return small if self.small else real


@dataclass(frozen=True)
class Built:
    """A case in memory.

    Args:
        function: takes the inputs and ``impl``.
        inputs: of the call.
        work: parts of it.
        clips: that a call handles.
        branches: of a clip; 0 where there are none.
        exact: the truth of the inputs; None is ``function`` by the reference in float64.
    """

    function: Call
    inputs: tuple
    work: list[Work]
    clips: int = 0
    branches: int = 0
    exact: Call | None = None


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Args:
        name: unique, as "res3.1"; where it begins with "paper", of that preset.
        op: public name in sdr_kernels.
        build: makes it in a dtype on a device.
        ties: its answer hangs on ReLUs and pools of batch statistics.
        threads: of a CPU.
    """

    name: str
    op: str
    build: Callable[[Sizes, torch.device, torch.dtype], Built]
    ties: bool = False
    threads: int = 1


def impls_of(op: str) -> list[str]:
    """The reference first, then what the op has for any device."""
    module = op_of(op)
    choices = choice(module, torch.empty(0))
    has_cpu = module in COMPOSED or choices["runs"] == "cpu"
    return ["reference", *["cpu"] * has_cpu, *GPU_ORDER.get(module, ("triton",))]


def why_not_here(op: str, impl: str, device: torch.device) -> str:
    """Empty where an implementation runs on this device, else the reason."""
    found = choice(op_of(op), torch.empty(0, device=device))
    reason = found["why_not"].get(impl, "")
    return "" if reason == f"{found['runs']} comes first" else reason


def named_call(op: str) -> Call:
    """The public function; the last input holds its named arguments."""

    def run(*inputs: object, impl: str) -> object:
        *positional, named = inputs
        return getattr(sdr_kernels, op)(*positional, **named, impl=impl)

    return run


def differentiated(function: Call) -> Call:
    """Output and gradients; the last input is the output's gradient, and inputs that ask for one get theirs."""

    def run(*inputs: object, **options: str) -> tuple[Tensor, ...]:
        *rest, dout = inputs
        leaves = [t for t in tensors_of(rest) if t.requires_grad]
        with torch.enable_grad():
            out = function(*rest, **options)
            found = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        return out.detach(), *found

    return run


@cache
def layers_at(preset: str, sizes: Sizes, clips: int, itemsize: int) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers_of(sizes.config(preset), clips, itemsize)}


def build_layer(preset: str, name: str, clips: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    layer = layers_at(preset, sizes, clips, dtype.itemsize)[name]
    positional, named = layer_inputs(layer, sizes.config(preset), clips, device, dtype)
    function = named_call(layer.op)
    whole = layer.op in ("temporal_stem", "temporal_bottleneck") and device.type == "cuda"
    exact = clip_by_clip(partial(function, impl="reference")) if whole else None
    return Built(function, (*positional, named), [layer], clips, sizes.config(preset).num_branches, exact)


def build_chain(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    config = sizes.config()
    layers = [layer for layer in layers_of(config, 1, dtype.itemsize) if layer.stage in CHAIN]
    blocks, x = [], None
    for layer in layers:
        (first, *weights), named = layer_inputs(layer, config, 1, device, dtype)
        x = first if x is None else x
        convs = [sdr_kernels.FoldedConv(*conv) for conv in weights]
        # kept near the size of the input, or blocks of random weights would leave float16's range
        convs[2] = convs[2]._replace(scale=0.3 * convs[2].scale)
        blocks.append(sdr_kernels.FoldedBottleneck(*convs, *[None] * (4 - len(convs)), **named))
    return Built(sdr_kernels.bottleneck_chain, (x, blocks), layers, 1, config.num_branches)


def build_conv(gradient: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    """a of a block with its norm and ReLU, with its gradients or without."""
    config = sizes.config()
    s, V = shapes_of(config)[CONV], config.num_branches
    x = random_rows((1, V, s.C_in, s.T, s.H, s.H), device, dtype)
    weight, scale, shift = packed(folded(V, s.inner, s.C_in, s.kernel, device, dtype))
    count = V * s.T * s.H * s.H
    flops, values = 2 * count * s.kernel * s.C_in * s.inner, count * (s.C_in + s.inner) + weight.numel()
    if not gradient:
        work = Moved(flops, values * dtype.itemsize)
        return Built(named_call("temporal_conv3d"), (x, weight, scale, shift, {"relu": True}), [work], 1, V)
    leaves = [t.requires_grad_() for t in (x, weight, scale, shift)]
    dout = random_rows((1, V, s.inner, s.T, s.H, s.H), device, dtype)
    parts = [Moved(flops, values * dtype.itemsize) for _ in range(3)]  # forward, dx and dweight
    return Built(differentiated(named_call("temporal_conv3d")), (*leaves, {"relu": True}, dout), parts, 1, V)


def normed(V: int, C_in: int, C_out: int, k: int, device: torch.device) -> sdr_kernels.NormedConv:
    """A layer of training, in float32 as the parameters are."""
    tensors = folded(V, C_out, C_in, k, device, torch.float32)
    return sdr_kernels.NormedConv(*(t.requires_grad_() for t in tensors))


def build_normed_stem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    config, clips = sizes.trained(), TRAINED_CLIPS[sizes.kind]
    s, V = shapes_of(config)["stem"], config.num_branches

    def function(x: Tensor, conv: sdr_kernels.NormedConv, *, impl: str) -> Tensor:
        return sdr_kernels.normed_stem(x, conv, impl=impl).out

    x = random_rows((clips, V, 3, s.T, s.H, s.H), device, dtype)
    dout = random_rows((clips, V, s.C_out, s.T, s.H // 4, s.H // 4), device, dtype)
    work = [each for each in training_passes(config, clips, "gram", dtype.itemsize) if each.layer == "stem"]
    inputs = x, normed(V, 3, s.C_out, s.kernel, device), dout
    return Built(differentiated(function), inputs, work, clips, V)


def build_normed_block(name: str, scheme: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    config, clips = sizes.trained(), TRAINED_CLIPS[sizes.kind]
    s, V = shapes_of(config)[name], config.num_branches

    def function(x: Tensor, block: sdr_kernels.NormedBottleneck, *, impl: str) -> Tensor:
        return sdr_kernels.normed_bottleneck(x, block, scheme=scheme, impl=impl).out

    shapes = [(s.C_in, s.inner, s.kernel), (s.inner, s.inner, 1), (s.inner, s.C_out, 1)]
    shapes += [(s.C_in, s.C_out, 1)] * s.branch1
    convs = [normed(V, *shape, device) for shape in shapes]
    block = sdr_kernels.NormedBottleneck(*convs, *[None] * (4 - len(convs)), pool=s.pool, time_pool=s.time_pool)
    x = random_rows((clips, V, s.C_in, s.T, s.H, s.H), device, dtype).requires_grad_()
    side, frames = s.H // 2 if s.pool else s.H, s.T // 2 if s.time_pool else s.T
    dout = random_rows((clips, V, s.C_out, frames, side, side), device, dtype)
    work = [each for each in training_passes(config, clips, scheme, dtype.itemsize) if each.layer == name]
    return Built(differentiated(function), (x, block, dout), work, clips, V)


def build_views(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    clips = decoded_clips(*((1, 2, 32) if sizes.small else (BATCHES[sizes.kind][0], 32, 224)), device)
    named = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    def function(*inputs: Tensor, impl: str, dtype: torch.dtype = dtype) -> Tensor:
        return sdr_kernels.clip_views(*inputs, **named, dtype=dtype, impl=impl)

    work = [Moved(0, clips.numel() * (1 + VIEWS * dtype.itemsize))]
    exact = partial(function, impl="reference", dtype=torch.float64)
    return Built(function, (clips, *maps_of(clips)), work, len(clips), exact=exact)


def build_info_nce(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    N, D = sizes.of(LOSS_ROWS[sizes.kind], 40), sizes.of(128, 16)
    features, labels = rows(N, D, dtype, device)
    # the similarities forwards; again, and times both sides, backwards
    work = [Moved(2 * N * N * D, N * D * dtype.itemsize), Moved(4 * N * N * D, 2 * N * D * dtype.itemsize)]
    return Built(differentiated(sdr_kernels.info_nce), (features, labels, torch.ones((), device=device)), work)


def build_kl(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    _, _, _, joint, loo = batch(sizes.of(1024, 16), dtype, device)
    work = [Moved(0, 2 * (joint.nbytes + loo.nbytes))]
    return Built(differentiated(sdr_kernels.leave_one_out_kl), (joint, loo, torch.ones((), device=device)), work)


def build_sdr_loss(D: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    inputs = batch(sizes.of(D, 16), dtype, device)
    B, V, D = inputs[0].shape
    work = [Moved(6 * (B * V) ** 2 * D, 2 * sum(t.nbytes for t in inputs))]
    return Built(differentiated(sdr_kernels.sdr_loss), (*inputs, torch.ones(4, device=device)), work, B)


def layer_cases(kind: str) -> list[Case]:
    """Every distinct layer of ``ftcn_released`` and those that ``paper`` adds."""
    cases = []
    for clips in BATCHES[kind]:
        seen: set[tuple] = set()
        for preset in ("ftcn_released", "paper"):
            for layer, _ in distinct(layers_of(Sizes(kind, False).config(preset), clips)):
                if (layer.op, layer.shape) in seen or (preset == "paper" and layer.op == "spatial_mean"):
                    continue
                seen.add((layer.op, layer.shape))
                name = layer.name if preset == "ftcn_released" else f"paper {layer.name}"
                name += f" of {clips} clips" * (clips > 1)
                cases.append(Case(name, layer.op, partial(build_layer, preset, layer.name, clips)))
    return cases


def of_clips(name: str, clips: int, branches: int) -> str:
    """The name with what it is of, as "res3.1, 1 clip x 4 branches"."""
    of = f", {clips} clip{'s' * (clips > 1)}" * (clips > 0)
    return name + of + f" x {branches} branch{'es' * (branches > 1)}" * (branches > 0)


def cases(kind: str) -> list[Case]:
    """All of a kind of device; every public op of sdr_kernels is among them."""
    found = layer_cases(kind)
    found.append(Case(" and ".join(CHAIN), "bottleneck_chain", build_chain, threads=2))
    found.append(Case(f"a of {CONV}", "temporal_conv3d", partial(build_conv, False)))
    found.append(Case(f"a of {CONV} with gradient", "temporal_conv3d", partial(build_conv, True), ties=True))
    frames = f", {TRAINED_FRAMES} frames" * (kind == "cpu")
    found.append(Case(f"stem in training{frames}", "normed_stem", build_normed_stem, ties=True))
    for name in TRAINED[kind]:
        for scheme in ("gram", "fused"):
            build = partial(build_normed_block, name, scheme)
            found.append(Case(f"{name} in training by {scheme}{frames}", "normed_bottleneck", build, ties=True))
    found.append(Case(f"{VIEWS} views", "clip_views", build_views))
    found.append(Case("InfoNCE with gradient", "info_nce", build_info_nce))
    found.append(Case("KL with gradient", "leave_one_out_kl", build_kl))
    found += [Case(f"losses of {D}", "sdr_loss", partial(build_sdr_loss, D)) for D in (1024, 2048)]
    return found
