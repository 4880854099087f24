"""Step "peers": what else could run the same model on the same GPU in the same run."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from inputs import random_model, random_rows, random_views
from ledger import Ledger
from machine import Machine
from timings import CLIPS
from torch import Tensor, nn

from sdr import SDRModel
from sdr.ftcn import Backbone, Bottleneck
from sdr.layers import shapes_of
from sdr.model import SDROutput

LIMIT_S = 3.0  # of one measurement
COMPILE_S = 40.0  # not begun with less time left
AUTOTUNE_S = 90.0
BLOCK = "res3.2"  # the bottleneck of the grouped convolution: its timing here is of the same work

Call = Callable[[], object]


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
    return partial(model, views)


def graphed(model: nn.Module, views: Tensor) -> Call:
    """A CUDA graph over the model's forward pass."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(views)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(views)
    return graph.replay


def compiled(model: nn.Module, views: Tensor, *, mode: str | None, backend: str) -> Call:
    """torch.compile over every branch's backbone, which share their code, and over what follows them."""
    inner = model.model
    options = {"mode": mode} if mode else {}
    for part in (*inner.branches, inner.trfi, inner.transformer):
        part.compile(backend=backend, dynamic=False, **options)
    model(views)
    return partial(model, views)


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

    def run() -> Tensor:
        tokens = branches(parameters, buffers, views).mean((-2, -1)).transpose(2, 3)  # [B, V, N, C]
        return inner.transformer(inner.trfi(tokens).tokens)

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


def time_blocks(ledger: Ledger, machine: Machine, clips: int) -> None:
    """One bottleneck of V branches: a loop over the branches' own, and grouped convolutions."""
    config = machine.configs()["ftcn_released"]
    s = shapes_of(config)[BLOCK]
    V = config.num_branches
    blocks = [Bottleneck(s.C_in, s.inner, kernel=s.kernel, pool=False) for _ in range(V)]
    blocks = [block.to(machine.device, machine.half, memory_format=torch.channels_last_3d).eval() for block in blocks]
    joined = random_rows((clips, 1, V * s.C_in, s.T, s.H, s.H), machine.device, machine.half)[:, 0]
    single = [random_rows((clips, 1, s.C_in, s.T, s.H, s.H), machine.device, machine.half)[:, 0] for _ in blocks]
    calls = {
        "eager loop bf16 channels_last_3d": lambda: [block(x) for block, x in zip(blocks, single, strict=True)],
        "grouped conv3d bf16 channels_last_3d": partial(GroupedBottleneck(blocks).eval(), joined),
    }
    for name, call in calls.items():
        timed = partial(machine.measure, call, limit_s=LIMIT_S)
        ledger.attempt(f"block {BLOCK}, {clips} clips: {name}", timed, needs_s=LIMIT_S)


def time_peer(
    build: Callable[[nn.Module, Tensor], Call], model: nn.Module, views: Tensor, machine: Machine
) -> dict[str, object]:
    """Seconds of the forward pass that ``build`` makes of a model and its views, by GPU events."""
    machine.release()
    with torch.inference_mode():
        call = build(model, views)
    result = machine.measure(call, limit_s=LIMIT_S)
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
