"""FTCN: the temporal-only 3D ResNet of one branch (SPB), and the single-branch model built on it.

Zheng et al., "Exploring Temporal Coherence for More General Video Face Forgery Detection", ICCV 2021. Every kernel is
Kt x 1 x 1; space is mixed only by max-pools, which replace every spatial stride.
"""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr.config import TEMPORAL_STRIDE, FTCNConfig
from sdr.hub import PretrainedMixin
from sdr.recompute import recompute
from sdr.stages import enter
from sdr.tpa import normalise
from sdr.transformer import TemporalTransformer

STEM_KERNEL = 5


def res_kernel(stage: int, block: int) -> int:
    """Temporal kernel of conv a (I3D's pattern): all 3 in res2, every other block from res3 on, res5 starts with 1."""
    if stage == 2:
        return 3
    return 3 if (block + (stage == 5)) % 2 == 0 else 1


class TemporalConv3d(nn.Conv3d):
    """(Kt, 1, 1) convolution without bias, zero-padded to keep T; x: [B, C, T, H, W].

    With a ``spatial_kernel`` Ks it is (Kt, Ks, Ks), padded likewise: for the control that looks sideways.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, spatial_kernel: int = 1) -> None:
        sizes = (kernel, spatial_kernel, spatial_kernel)
        super().__init__(in_channels, out_channels, sizes, padding=tuple(size // 2 for size in sizes), bias=False)


class Stem(nn.Module):
    """5x1x1 convolution at full resolution, BN, 2x2 pool, ReLU, 3x3 pool of stride 2: H to H / 4."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        conv: Callable[..., nn.Module] = TemporalConv3d,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
        *,
        spatial_kernel: int = 1,
    ) -> None:
        super().__init__()
        self.conv = conv(3, channels, kernel, spatial_kernel)
        self.bn = norm(channels)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.relu = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3, T, H, W] to [B, C, T, H / 4, W / 4]."""
        # BN before the pool: max commutes with it only where gamma >= 0
        return self.pool2(self.relu(self.pool1(self.bn(self.conv(x)))))


class Bottleneck(nn.Module):
    """a (Kt,1,1), b (1,1,1), c (1,1,1), each with BN; plus the input or its projection; ReLU.

    Args:
        in_channels: channels of the input.
        channels: inner channels; the output has four times as many.
        kernel: Kt of conv a.
        pool: halve H and W after b's BN and after branch1's BN, so that both convolutions run at full resolution.
        conv: makes a convolution from (in_channels, out_channels, kernel, spatial_kernel), the last two 1 by default.
        norm: makes a batch norm from its channels.
        spatial_kernel: Ks of conv b, which is then (1, Ks, Ks).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel: int,
        pool: bool,
        conv: Callable[..., nn.Module] = TemporalConv3d,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
        spatial_kernel: int = 1,
    ) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.a, self.a_bn = conv(in_channels, channels, kernel), norm(channels)
        self.b, self.b_bn = conv(channels, channels, 1, spatial_kernel), norm(channels)
        self.c, self.c_bn = conv(channels, out_channels), norm(out_channels)
        self.has_branch1 = in_channels != out_channels
        if self.has_branch1:
            self.branch1, self.branch1_bn = conv(in_channels, out_channels), norm(out_channels)
        self.pool = nn.MaxPool3d((1, 2, 2)) if pool else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, T, H, W] to [B, 4 * channels, T, H, W], or half of H and W."""
        shortcut = self.pool(self.branch1_bn(self.branch1(x))) if self.has_branch1 else x
        x = self.relu(self.a_bn(self.a(x)))
        x = self.relu(self.pool(self.b_bn(self.b(x))))
        return self.relu(self.c_bn(self.c(x)) + shortcut)


class Backbone(nn.Module):
    """Stem and res2..res5 of one branch: a clip to its features."""

    def __init__(
        self,
        config: FTCNConfig,
        conv: Callable[..., nn.Module] = TemporalConv3d,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
    ) -> None:
        super().__init__()
        kernel = STEM_KERNEL if config.temporal_kernels else 1
        self.stem = Stem(config.width, kernel, conv, norm, spatial_kernel=config.spatial_kernel)
        out = [config.width] + [config.width * 4 * 2**i for i in range(config.backbone_stages)]
        self.stages = [f"res{i + 2}" for i in range(config.backbone_stages)]
        for i, (in_channels, out_channels) in enumerate(pairwise(out)):
            blocks = nn.Sequential()
            for block in range(config.blocks[i]):
                blocks.append(
                    Bottleneck(
                        in_channels if block == 0 else out_channels,
                        out_channels // 4,
                        kernel=res_kernel(i + 2, block) if config.temporal_kernels else 1,
                        pool=i > 0 and block == 0,
                        conv=conv,
                        norm=norm,
                        spatial_kernel=config.spatial_kernel,
                    )
                )
            self.add_module(self.stages[i], blocks)
        self.time_pool = nn.MaxPool3d((TEMPORAL_STRIDE, 1, 1))
        self.recompute = False  # in training, keep the input of each block alone
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation of the convolutions; gamma of every c-BN zero, so that a block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.c_bn.weight)

    def forward(self, clip: Tensor) -> Tensor:
        """clip: normalised, [B, 3, T, H, W], to features, [B, C, T / 2, h, w]."""
        saving = self.recompute and self.training and torch.is_grad_enabled()
        clip = enter("stem", clip)
        x = recompute(self.stem, clip) if saving else self.stem(clip)
        for i, name in enumerate(self.stages):
            x, stage = enter(name, x), getattr(self, name)
            x = reduce(lambda x, block: recompute(block, x), stage, x) if saving else stage(x)
            if i == 0:
                x = self.time_pool(x)
        return x

    def tokens(self, clip: Tensor) -> Tensor:
        """clip: [B, 3, T, H, W] to features averaged over space, [B, N, C]."""
        return enter("head", enter("head", self(clip)).mean((-2, -1)).transpose(1, 2))


class FTCNOutput(NamedTuple):
    """What a model of one branch says of a batch of clips.

    Attributes:
        logits: [B], before the sigmoid, 1 = fake.
        tokens: [B, N, D], what the transformer reads.
    """

    logits: Tensor
    tokens: Tensor


class FTCN(PretrainedMixin, nn.Module):
    """FTCN alone: one branch and the temporal transformer, the baseline row of the paper's Table III."""

    def __init__(self, config: FTCNConfig, norm: Callable[[int], nn.Module] = nn.BatchNorm3d) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, norm=norm)
        C, D = config.backbone_channels, config.embed_dim
        self.proj = nn.Linear(C, D) if C != D else nn.Identity()
        self.transformer = TemporalTransformer(config)

    def forward(self, clip: Tensor) -> FTCNOutput:
        """clip: [B, 3, T, H, W], normalised floats or uint8, which are normalised here."""
        check_clip(clip, self.config, ndim=5)
        tokens = self.proj(self.backbone.tokens(normalise(clip)))
        return FTCNOutput(self.transformer(tokens), tokens)


def check_clip(clip: Tensor, config: FTCNConfig, *, ndim: int) -> None:
    """Raise ValueError unless the last axes of ``clip`` are [3, T, H, W] of the configuration."""
    expected = (3, config.num_frames, config.image_size, config.image_size)
    if clip.ndim != ndim or tuple(clip.shape[-4:]) != expected:
        raise ValueError(f"clip must end in {list(expected)} and have {ndim} axes, got {list(clip.shape)}")
