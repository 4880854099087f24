"""The backbones of all branches in training, as one grouped pass of :mod:`sdr_kernels`: same numbers, less memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdr.config import GroupedConfig
from sdr.ftcn import Backbone, Bottleneck
from sdr.stages import enter
from sdr.sync_norm import SyncBatchNorm3d
from sdr_kernels import Normed, NormedBottleneck, NormedConv, Statistics, normed_bottleneck, normed_stem
from sdr_kernels._ops import why_not


def norms_of(branches: Sequence[Backbone]) -> list[nn.Module]:
    """Every batch norm of every branch."""
    return [getattr(b, name) for branch in branches for b, name in _normed_layers(branch)]


def _normed_layers(branch: Backbone) -> Iterator[tuple[nn.Module, str]]:
    yield branch.stem, "bn"
    for block in (m for m in branch.modules() if isinstance(m, Bottleneck)):
        yield from ((block, f"{name}_bn") for name in layer_names(block))


def layer_names(block: Bottleneck) -> list[str]:
    return ["a", "b", "c"] + ["branch1"] * block.has_branch1


def why_not_grouped(branches: Sequence[Backbone]) -> str:
    """Empty where the branches can be trained in one pass, else the reason why not."""
    norms = norms_of(branches)
    kinds = {type(norm) for norm in norms}
    if len(kinds) > 1 or not kinds <= {nn.BatchNorm3d, SyncBatchNorm3d}:
        return f"batch norms are {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if not all(norm.affine and norm.track_running_stats for norm in norms):
        return "a batch norm has no gamma and beta, or no running statistics"
    if len({norm.training for norm in norms}) > 1:
        return "some batch norms are in training and some are not"
    if len({(norm.eps, norm.momentum) for norm in norms}) > 1 or norms[0].momentum is None:
        return "batch norms have several eps or momenta, or a momentum of None"
    return ""


def why_not_impl(config: GroupedConfig, device: torch.device) -> str:
    """Empty where the named implementation runs on a device, else the reason why not; "auto" and "reference" do."""
    if config.impl == "triton":
        return why_not("triton", device)
    if config.impl == "cpu" and device.type != "cpu":
        return f"it needs CPU tensors, got {device}"
    return ""


def bn_mode(branches: Sequence[Backbone]) -> str:
    """Of the ops: that of the first batch norm, which is everyone's."""
    norm = branches[0].stem.bn
    if not norm.training:
        return "frozen"
    return "sync" if isinstance(norm, SyncBatchNorm3d) else "batch"


def stacked(convs: Sequence[nn.Conv3d], norms: Sequence[nn.BatchNorm3d]) -> NormedConv:
    """A layer of all branches; gradients flow to each one's own parameters."""
    weight = torch.stack([conv.weight.flatten(2) for conv in convs])  # [V, C_out, C_in, k]
    gamma, beta = (torch.stack(values) for values in zip(*((n.weight, n.bias) for n in norms), strict=True))
    running = (None, None)
    if not norms[0].training:
        running = (torch.stack([n.running_mean for n in norms]), torch.stack([n.running_var for n in norms]))
    return NormedConv(weight, gamma, beta, *running, norms[0].eps)


class GroupedPass:
    """One forward pass through the branches.

    Args:
        branches: a backbone for each view; the same one may stand for several.
        options: scheme, recomputation and implementation.
    """

    def __init__(self, branches: Sequence[Backbone], options: GroupedConfig) -> None:
        self.branches, self.options = branches, options
        self.bn = bn_mode(branches)
        self.seen: list[tuple[list[nn.BatchNorm3d], Statistics]] = []

    def tokens(self, views: Tensor) -> Tensor:
        """views: [B, V, 3, T, H, W], or [B, 3, T, H, W] for all branches, normalised, in the dtype of the convolutions,
        to tokens averaged over space, [B, V, N, C]. Running statistics follow the batch.
        """
        x = self.part("stem", self.stem, views)
        for name in self.branches[0].stages:
            x = self.part(name, lambda x, name=name: self.stage(x, name), x)
        x = enter("statistics", x)
        self.update_running()
        return enter("head", x).mean((-2, -1)).transpose(-1, -2)

    def part(self, name: str, run: Callable[[Tensor], tuple], x: Tensor) -> Tensor:
        """One part of the backbones, recomputed where the options say so; keeps its statistics in ``seen``."""
        x = enter(name, x)
        wanted = self.branches[0].recompute or name in self.options.recompute
        if wanted and torch.is_grad_enabled():
            x, norms, statistics = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, norms, statistics = run(x)
        self.seen += zip(norms, statistics, strict=False)  # there are none where they are frozen
        return x

    def stem(self, views: Tensor) -> tuple[Tensor, list[list[nn.BatchNorm3d]], list[Statistics]]:
        stems = [branch.stem for branch in self.branches]
        norms = [stem.bn for stem in stems]
        conv = stacked([stem.conv for stem in stems], norms)
        out, statistics = normed_stem(views, conv, bn=self.bn, impl=self.options.impl)
        return out, [norms], statistics

    def stage(self, x: Tensor, name: str) -> tuple[Tensor, list[list[nn.BatchNorm3d]], list[Statistics]]:
        norms, statistics = [], []
        blocks = list(zip(*(getattr(branch, name) for branch in self.branches), strict=True))
        for i, peers in enumerate(blocks):
            last = name == self.branches[0].stages[0] and i == len(blocks) - 1  # before the pool over time
            x, found = self.block(x, peers, time_pool=last)
            norms += [[getattr(b, f"{layer}_bn") for b in peers] for layer in layer_names(peers[0])]
            statistics += found
        return x, norms, statistics

    def block(self, x: Tensor, peers: Sequence[Bottleneck], *, time_pool: bool) -> Normed:
        """The same bottleneck of every branch."""
        names = layer_names(peers[0])
        convs = {
            name: stacked([getattr(b, name) for b in peers], [getattr(b, f"{name}_bn") for b in peers])
            for name in names
        }
        block = NormedBottleneck(**convs, pool=isinstance(peers[0].pool, nn.MaxPool3d), time_pool=time_pool)
        return normed_bottleneck(x, block, scheme=self.options.scheme, bn=self.bn, impl=self.options.impl)

    def update_running(self) -> None:
        """As PyTorch does: by momentum, the variance unbiased; a norm that stands for several views follows each."""
        if not self.seen:
            return
        sizes = [statistics.mean.shape[1] for _, statistics in self.seen]
        means = torch.cat([s.mean for _, s in self.seen], 1)  # [V, C of all norms]
        variances = torch.cat([s.var * (s.rows / (s.rows - 1)) for _, s in self.seen], 1)
        with torch.no_grad():
            for v in range(len(self.branches)):
                norms = [norms[v] for norms, _ in self.seen]
                buffers = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
                values = torch.stack([means[v], variances[v]]).to(buffers[0].dtype)
                torch._foreach_lerp_(buffers, [part for row in values for part in row.split(sizes)], norms[0].momentum)
                torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
