"""Step "peers": what else could run the same model on the same GPU in the same run."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from cudnn_peer import fused_blocks
from inputs import random_model, random_rows, random_views
from ledger import NOT_MEASURED, Ledger
from machine import Machine
from tensorrt_peer import tensorrt_call
from timings import CLIPS
from torch import Tensor, nn

from sdr import SDRConfig, SDRModel
from sdr.ftcn import Backbone, Bottleneck
from sdr.layers import shapes_of
from sdr.model import SDROutput

LIMIT_S = 3.0  # of one measurement
COMPILE_S = 40.0  # not begun with less time left
AUTOTUNE_S = 90.0
ENGINE_S = 60.0
BLOCK = "res3.2"  # the bottleneck of the grouped convolution: its timing here is of the same work

Call = Callable[[Tensor], SDROutput]


class ChannelsLast(nn.Module):
    """The reference with every branch's clip and weights in channels_last_3d."""

    def __init__(self, model: SDRModel) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last_3d)

    def forward(self, views: Tensor) -> SDROutput:
        """views: [B, V, 3, T, H, W], of which each branch's slice is channels_last_3d."""
        return self.model(views)


def branch_major(views: Tensor, *, channels_last: bool) -> Tensor:
    """The same [B, V, 3, T, H, W] with branches outermost in memory, so that a branch's clips are one piece."""
    views = views.transpose(0, 1)
    if channels_last:
        return views.movedim(2, -1).contiguous().movedim(-1, 2).transpose(0, 1)
    return views.contiguous().transpose(0, 1)


def eager(model: nn.Module, views: Tensor) -> Call:
    return model


def graphed(model: nn.Module, views: Tensor) -> Call:
    """A CUDA graph over the model's forward pass of these views."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(views)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(views)

    def run(_: Tensor) -> SDROutput:
        graph.replay()
        return output

    return run


def compiled(model: nn.Module, views: Tensor, *, mode: str | None, backend: str) -> Call:
    """torch.compile over every branch's backbone, which share their code, and over what follows them."""
    inner = model.model
    options = {"mode": mode} if mode else {}
    for part in (*inner.branches, inner.trfi, inner.transformer):
        part.compile(backend=backend, dynamic=False, **options)
    model(views)
    return model


def compiled_graph(model: nn.Module, views: Tensor, *, backend: str) -> Call:
    """A CUDA graph over what torch.compile made, which is found in its cache where it was made before."""
    compiled(model, views, mode=None, backend=backend)
    return graphed(model, views)


def stacked(model: nn.Module, views: Tensor) -> Call:
    """torch.func.vmap over the branches' stacked weights; the head as it is."""
    inner = model.model
    parameters, buffers = torch.func.stack_module_state(list(inner.branches))
    base: Backbone = copy.deepcopy(inner.branches[0]).to("meta")

    def backbone(parameters: dict, buffers: dict, clip: Tensor) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (clip,))

    branches = torch.func.vmap(backbone, in_dims=(0, 0, 1), out_dims=1)

    def run(views: Tensor) -> SDROutput:
        tokens = branches(parameters, buffers, views).mean((-2, -1)).transpose(2, 3)  # [B, V, N, C]
        joint = inner.trfi(tokens)
        return SDROutput(inner.transformer(joint.tokens), *joint)

    return run


class GroupedBottleneck(nn.Module):
    """An identity block of V branches by ``F.conv3d(groups=V)``, batch norms folded; x: [B, V * C, T, H, W]."""

    def __init__(self, blocks: list[Bottleneck]) -> None:
        super().__init__()
        self.groups = len(blocks)
        for name in "abc":
            convs = [getattr(block, name) for block in blocks]
            norms = [getattr(block, f"{name}_bn") for block in blocks]
            scale = torch.cat([n.weight / (n.running_var + n.eps).sqrt() for n in norms])
            shift = torch.cat([n.bias for n in norms]) - scale * torch.cat([n.running_mean for n in norms])
            weight = torch.cat([conv.weight for conv in convs]) * scale[:, None, None, None, None]
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
            setattr(self, name, nn.Parameter(weight))
            setattr(self, f"{name}_bias", nn.Parameter(shift))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv3d(x, self.a, self.a_bias, padding=(self.a.shape[2] // 2, 0, 0), groups=self.groups).relu_()
        h = F.conv3d(h, self.b, self.b_bias, groups=self.groups).relu_()
        return F.conv3d(h, self.c, self.c_bias, groups=self.groups).add_(x).relu_()


Blocks = Callable[[list[Tensor]], list[Tensor]]  # each branch's rows, [B, C, T, H, W], to its result


def block_inputs(
    config: SDRConfig, clips: int, device: torch.device, dtype: torch.dtype, *, channels_last: bool = True
) -> tuple[list[Bottleneck], list[Tensor]]:
    """An identity block of each branch in evaluation, and its rows, [B, C, T, H, W]."""
    s, V = shapes_of(config)[BLOCK], config.num_branches
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    blocks = [Bottleneck(s.C_in, s.inner, kernel=s.kernel, pool=False) for _ in range(V)]
    for block in blocks:
        for norm in (block.a_bn, block.b_bn, block.c_bn):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # c's begins at zero, and the block would be its input
            nn.init.normal_(norm.bias, std=0.3)
    blocks = [block.to(device, dtype, memory_format=layout).eval() for block in blocks]
    x = random_rows((clips, V, s.C_in, s.T, s.H, s.H), device, dtype)
    return blocks, [x[:, v].contiguous(memory_format=layout) for v in range(V)]


def block_loop(blocks: list[Bottleneck], _: list[Tensor]) -> Blocks:
    return lambda rows: [block(x) for block, x in zip(blocks, rows, strict=True)]


def block_grouped(blocks: list[Bottleneck], _: list[Tensor]) -> Blocks:
    """Grouped convolutions; joining the branches and cutting them apart is part of the call."""
    grouped = GroupedBottleneck(blocks).eval()

    def run(rows: list[Tensor]) -> list[Tensor]:
        joined = torch.cat(rows, 1).contiguous(memory_format=torch.channels_last_3d)
        return list(grouped(joined).chunk(len(rows), 1))

    return run


def block_stacked(blocks: list[Bottleneck], _: list[Tensor]) -> Blocks:
    """torch.func.vmap over the blocks' stacked weights."""
    parameters, buffers = torch.func.stack_module_state(blocks)
    base = copy.deepcopy(blocks[0]).to("meta")

    def one(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    call = torch.func.vmap(one)
    return lambda rows: list(call(parameters, buffers, torch.stack(rows)).unbind())


def block_compiled(blocks: list[Bottleneck], rows: list[Tensor], *, backend: str = "inductor") -> Blocks:
    """torch.compile over every block; the branches share their code."""
    made = [torch.compile(block, backend=backend, dynamic=False) for block in blocks]
    call = block_loop(made, rows)
    call(rows)
    return call


def joined_rows(blocks: list[Bottleneck], rows: list[Tensor]) -> Callable[[], Tensor]:
    """Grouped convolutions on branches that lie joined in memory already, as a whole grouped network has them."""
    joined = torch.cat(rows, 1).contiguous(memory_format=torch.channels_last_3d)
    return partial(GroupedBottleneck(blocks).eval(), joined)


def time_blocks(ledger: Ledger, machine: Machine, clips: int) -> None:
    """One bottleneck of V branches: a loop over the branches' own, grouped convolutions, cuDNN's fused graphs."""
    config = machine.configs()["ftcn_released"]
    blocks, rows = block_inputs(config, clips, machine.device, machine.half)
    builds: dict[str, Callable[[], Callable[[], object]]] = {
        "eager loop bf16 channels_last_3d": lambda: partial(block_loop(blocks, rows), rows),
        "grouped conv3d bf16 channels_last_3d": lambda: joined_rows(blocks, rows),
        "cuDNN frontend bf16": lambda: partial(fused_blocks(blocks, rows), rows),
    }
    for name, build in builds.items():

        def timed(build: Callable = build) -> dict[str, object] | str:
            try:
                call = build()
            except ModuleNotFoundError as error:
                return f"{NOT_MEASURED}{error}"
            return machine.measure(call, limit_s=LIMIT_S)

        ledger.attempt(f"block {BLOCK}, {clips} clips: {name}", timed, needs_s=LIMIT_S)


def time_peer(
    build: Callable[[nn.Module, Tensor], Call], model: nn.Module, views: Tensor, machine: Machine
) -> dict[str, object]:
    """Seconds of the forward pass that ``build`` makes of a model and its views, by GPU events."""
    machine.release()
    with torch.inference_mode():
        call = build(model, views)
    result = machine.measure(partial(call, views), limit_s=LIMIT_S)
    return {"clips": len(views), "clips_per_s": len(views) / result["median_s"], **result}


def time_tensorrt(model: SDRModel, views: Tensor, machine: Machine) -> dict[str, object] | str:
    """Seconds of TensorRT's engine of the same model, which takes longer to build than to time."""
    views = views.contiguous()
    try:
        call = tensorrt_call(model, views)
    except ModuleNotFoundError as error:
        return f"{NOT_MEASURED}{error}"
    result = machine.measure(partial(call, views), limit_s=LIMIT_S)
    return {"clips": len(views), "clips_per_s": len(views) / result["median_s"], **result}


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter the time of every peer for many clips and for one; the compilers come last."""
    config = machine.configs()["ftcn_released"]
    sizes = (machine.scaled(CLIPS, 2), 1)
    torch.backends.cudnn.benchmark = True  # the library's best algorithm, as a careful user would have it
    model = random_model(config, machine.device)
    views = random_views(config, sizes[0], machine.device)

    def attempt(name: str, build: Callable, model: nn.Module, views: Tensor, needs_s: float = LIMIT_S) -> None:
        for clips in sizes:
            timed = partial(time_peer, build, model, views[:clips], machine)
            ledger.attempt(f"{name}, {clips} clips", timed, needs_s=needs_s)

    attempt("eager loop fp32 NCTHW", eager, model, branch_major(views, channels_last=False))
    model, views = model.to(machine.half), views.to(machine.half)
    attempt("eager loop bf16 NCTHW", eager, model, branch_major(views, channels_last=False))
    last, views = ChannelsLast(model), branch_major(views, channels_last=True)
    attempt("eager loop bf16 channels_last_3d", eager, last, views)
    attempt("CUDA graph over eager bf16 channels_last_3d", graphed, last, views)
    # compiled in place: a copy leaves the eager model as it is
    inductor, backend = copy.deepcopy(last), "eager" if machine.rehearsal else "inductor"
    default = partial(compiled, mode=None, backend=backend)
    attempt("torch.compile default bf16", default, inductor, views, COMPILE_S)
    time_blocks(ledger, machine, sizes[0])
    attempt("torch.func.vmap bf16 channels_last_3d", stacked, last, views)
    graph = partial(compiled_graph, backend=backend)
    attempt("CUDA graph over torch.compile default bf16", graph, inductor, views, COMPILE_S)
    torch.compiler.reset()
    tuned = partial(compiled, mode=None if machine.rehearsal else "max-autotune-no-cudagraphs", backend=backend)
    attempt("torch.compile max-autotune bf16", tuned, inductor, views, AUTOTUNE_S)
    for clips in sizes:
        timed = partial(time_tensorrt, model, views[:clips], machine)
        ledger.attempt(f"TensorRT, {clips} clips", timed, needs_s=ENGINE_S)
