"""SDRModel in plain PyTorch: the reference that every kernel is measured against."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr.config import SDRConfig
from sdr.ftcn import Backbone, check_clip
from sdr.hub import PretrainedMixin
from sdr.tpa import normalise
from sdr.transformer import TemporalTransformer
from sdr.trfi import TRFI


class SDROutput(NamedTuple):
    """What a model says of a batch of clips.

    Attributes:
        logits: [B], before the sigmoid, 1 = fake.
        tokens: [B, N, D], joint tokens that the transformer reads.
        features: [B, V, C], each branch's mean over time and space.
        joint_logits: [B, 2], real and fake, from all views.
        loo_logits: [B, V, 2], row v from all views but v; [B, 0, 2] for one branch.
    """

    logits: Tensor
    tokens: Tensor
    features: Tensor
    joint_logits: Tensor
    loo_logits: Tensor


class SDRModel(PretrainedMixin, nn.Module):
    """Reduced Spatial Dependency model (Chu et al., arXiv 2503.03270): V FTCN branches, TRFI, temporal transformer.

    Args:
        config: shapes and options; see :class:`sdr.config.SDRConfig` and the presets beside it.
        norm: makes a batch norm from its channels.
    """

    def __init__(self, config: SDRConfig, norm: Callable[[int], nn.Module] = nn.BatchNorm3d) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleList(
            Backbone(config.branch(), norm=norm) for _ in range(1 if config.share_weights else config.num_branches)
        )
        self.trfi = TRFI(config)
        self.transformer = TemporalTransformer(config)

    def forward(self, views: Tensor) -> SDROutput:
        """Score clips.

        Args:
            views: [B, V, 3, T, H, W], one augmented view per branch, or [B, 3, T, H, W], the same clip for all
                branches; normalised floats, or uint8, which is normalised here.

        Raises:
            ValueError: the number of views, T, H or W is not the configuration's.
        """
        self.check_views(views)
        joint = self.trfi(self.branch_tokens(normalise(views)))
        return SDROutput(
            self.transformer(joint.tokens), joint.tokens, joint.features, joint.joint_logits, joint.loo_logits
        )

    def branch_tokens(self, views: Tensor) -> Tensor:
        """views: normalised, as :meth:`forward` takes them, to each branch's tokens, [B, V, N, C]."""
        # a loop, not a batched pass: this is the readable definition
        branches = enumerate(self.branch_of_view())
        return torch.stack([b.tokens(views[:, v] if views.ndim == 6 else views) for v, b in branches], 1)

    def branch_of_view(self) -> list[Backbone]:
        """The backbone of each view: its own, or the one that is shared."""
        return [self.branches[v % len(self.branches)] for v in range(self.config.num_branches)]

    def check_views(self, views: Tensor) -> None:
        """Raise ValueError unless views are as :meth:`forward` takes them."""
        V = self.config.num_branches
        check_clip(views, self.config, ndim=6 if views.ndim == 6 else 5)
        if views.ndim == 6 and views.shape[1] != V:
            raise ValueError(f"views must have {V} views, got {list(views.shape)}")
