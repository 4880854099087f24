"""A model's weights as the kernels take them, batch norms folded and branches stacked, and the pass through them."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr.config import check
from sdr.ftcn import Backbone, Bottleneck
from sdr.model import SDRModel, SDROutput
from sdr.stages import enter, watched
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD
from sdr.transformer import TemporalTransformer
from sdr.trfi import TRFI
from sdr_kernels import (
    FoldedBottleneck,
    FoldedConv,
    bottleneck_chain,
    norm_linear,
    spatial_mean,
    temporal_stem,
    token_attention,
)


class PackedBackbones(NamedTuple):
    """The backbones of all branches, batch norms folded, in one dtype."""

    stem: FoldedConv
    blocks: list[FoldedBottleneck]
    stages: list[str]  # of each block

    def chain(self, x: Tensor) -> Tensor:
        """All blocks; for a profile stage by stage, which on a CPU takes longer."""
        if not watched():
            return bottleneck_chain(x, self.blocks)
        for name, blocks in groupby(zip(self.stages, self.blocks, strict=True), itemgetter(0)):
            x = bottleneck_chain(enter(name, x), [block for _, block in blocks])
        return x


def fold(convs: Sequence[nn.Conv3d], norms: Sequence[nn.BatchNorm3d], dtype: torch.dtype) -> FoldedConv:
    """A layer of V branches, stacked, and its batch norm in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.stack([conv.weight[..., 0, 0] for conv in convs]).to(dtype)  # [V, C_out, C_in, k]
    scales = [n.weight.to(wide) * (n.running_var.to(wide) + n.eps).rsqrt() for n in norms]
    shifts = [n.bias.to(wide) - n.running_mean.to(wide) * scale for n, scale in zip(norms, scales, strict=True)]
    return FoldedConv(weight, torch.stack(scales), torch.stack(shifts))


def pack_blocks(blocks: Sequence[Bottleneck], dtype: torch.dtype, *, time_pool: bool) -> FoldedBottleneck:
    """One bottleneck of every branch."""

    def layer(name: str) -> FoldedConv:
        conv = fold([getattr(b, name) for b in blocks], [getattr(b, f"{name}_bn") for b in blocks], dtype)
        if conv.weight.device.type == "cpu":
            order, back = (0, 3, 1, 2), (0, 2, 3, 1)  # [V, k, C_out, C_in]
            if dtype == torch.float32:
                conv = FoldedConv(conv.weight * conv.scale[..., None, None], None, conv.shift)
        else:
            order, back = (0, 3, 2, 1), (0, 3, 2, 1)  # [V, k, C_in, C_out]
        # the kernels' order of memory, or they would copy it at every call
        return conv._replace(weight=conv.weight.permute(order).contiguous().permute(back))

    first = blocks[0]
    branch1 = layer("branch1") if first.has_branch1 else None
    pool = isinstance(first.pool, nn.MaxPool3d)
    return FoldedBottleneck(layer("a"), layer("b"), layer("c"), branch1, pool=pool, time_pool=time_pool)


def pack_backbones(branches: Sequence[Backbone], dtype: torch.dtype) -> PackedBackbones:
    """Stem and bottlenecks of every branch, in the order of application."""
    blocks, stages = [], []
    for stage in branches[0].stages:
        depth = len(getattr(branches[0], stage))
        stages += [stage] * depth
        for i in range(depth):
            last = stage == branches[0].stages[0] and i == depth - 1  # before the pool over time
            blocks.append(pack_blocks([getattr(b, stage)[i] for b in branches], dtype, time_pool=last))
    stem = fold([b.stem.conv for b in branches], [b.stem.bn for b in branches], dtype)
    return PackedBackbones(stem, blocks, stages)


def backbone_tokens(views: Tensor, packed: PackedBackbones) -> Tensor:
    """views: [B, V, 3, T, H, W], or [B, 3, T, H, W] for all branches, to tokens, [B, V, N, C]."""
    normalise = (IMAGENET_MEAN, IMAGENET_STD) if views.dtype == torch.uint8 else None
    x = temporal_stem(enter("stem", views), *packed.stem, normalise=normalise)
    return spatial_mean(enter("head", packed.chain(x)))


class PackedLinear(NamedTuple):
    """Arguments of :func:`sdr_kernels.norm_linear` that stem from weights: ``norm`` is (gamma, beta, eps)."""

    weight: Tensor
    bias: Tensor | None  # float32 or wider, as gamma and beta
    norm: tuple[Tensor, Tensor, float] | None = None

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return norm_linear(x, self.weight, self.bias, norm=self.norm, activation=activation, residual=residual)


def pack_linear(linear: nn.Linear, dtype: torch.dtype, norm: nn.LayerNorm | None = None) -> PackedLinear:
    """A linear layer and the layer norm before it."""
    wide = torch.promote_types(dtype, torch.float32)
    bias = None if linear.bias is None else linear.bias.to(wide)
    affine = None if norm is None else (norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return PackedLinear(linear.weight.to(dtype), bias, affine)


class PackedTRFI:
    """TRFI with its joint and leave-one-out heads as one product: a view that a head leaves out has weights of 0."""

    def __init__(self, trfi: TRFI, dtype: torch.dtype) -> None:
        self.joint_feature = trfi.joint_feature
        layers = trfi.proj if isinstance(trfi.proj, nn.Sequential) else [trfi.proj]
        self.proj = [pack_linear(layer, dtype) for layer in layers if isinstance(layer, nn.Linear)]
        weights, biases = [trfi.joint_head.weight], [trfi.joint_head.bias]
        for v, head in enumerate(trfi.loo_heads):
            C = trfi.joint_head.in_features - head.in_features  # the view left out
            before, after = head.weight.tensor_split([v * C], dim=1)
            weights.append(torch.cat([before, before.new_zeros(2, C), after], 1))
            biases.append(head.bias)
        self.heads = PackedLinear(
            torch.cat(weights).to(dtype), torch.cat(biases).to(torch.promote_types(dtype, torch.float32))
        )

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens: [B, V, N, C] to joint tokens, features, joint and leave-one-out logits, as :class:`TRFI`."""
        if self.joint_feature == "mean":
            joint = tokens.mean(1)
        elif self.joint_feature == "sum":
            joint = tokens.sum(1)
        else:
            joint = tokens.transpose(1, 2).flatten(2)  # [B, N, V * C]
        for i, layer in enumerate(self.proj):
            joint = layer(joint, "gelu" if i + 1 < len(self.proj) else "none")
        features = tokens.mean(2)  # [B, V, C]
        logits = self.heads(features.flatten(1)).unflatten(1, (-1, 2))  # [B, 1 + V, 2]
        return joint, features, logits[:, 0], logits[:, 1:]


class PackedLayer(NamedTuple):
    """A pre-norm layer of the temporal transformer."""

    qkv: PackedLinear
    proj: PackedLinear
    mlp_in: PackedLinear
    mlp_out: PackedLinear


class PackedTransformer:
    """The temporal transformer; past the last attention only the CLS token is computed."""

    def __init__(self, transformer: TemporalTransformer, dtype: torch.dtype) -> None:
        self.num_heads = transformer.layers[0].attn.num_heads
        positions = transformer.pos_embed.detach()[0].to(dtype)
        self.cls_token = transformer.cls_token.detach()[0, 0].to(dtype) + positions[0]  # [D]
        self.pos_embed = positions[1:].contiguous()  # [N, D]
        self.layers = [
            PackedLayer(
                pack_linear(layer.attn.qkv, dtype, layer.attn_norm),
                pack_linear(layer.attn.proj, dtype),
                pack_linear(layer.mlp[0], dtype, layer.mlp_norm),
                pack_linear(layer.mlp[3], dtype),
            )
            for layer in transformer.layers
        ]
        self.head = pack_linear(transformer.head, dtype, transformer.norm)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: [B, N, D] to logits, [B]."""
        B, N, D = tokens.shape
        x = tokens.new_empty(B, N + 1, D)
        x[:, 0] = self.cls_token
        torch.add(tokens, self.pos_embed, out=x[:, 1:])
        for i, layer in enumerate(self.layers):
            attended = token_attention(layer.qkv(x), self.num_heads)
            if i == len(self.layers) - 1:
                attended, x = attended[:, 0], x[:, 0]
            x = layer.proj(attended, residual=x)
            x = layer.mlp_out(layer.mlp_in(x, "gelu"), residual=x)
        return self.head(x).squeeze(-1)


class PackedModel:
    """Everything that inference needs of an :class:`sdr.model.SDRModel`, in one dtype.

    Raises:
        ValueError: the model's convolutions look sideways, which no kernel does.
    """

    def __init__(self, model: SDRModel, dtype: torch.dtype) -> None:
        check(model.config.spatial_kernel == 1, "spatial_kernel", "be 1 for the kernels", model.config.spatial_kernel)
        self.num_branches = model.config.num_branches
        self.shared = model.config.share_weights and self.num_branches > 1
        self.backbones = pack_backbones(model.branches, dtype)
        self.trfi = PackedTRFI(model.trfi, dtype)
        self.transformer = PackedTransformer(model.transformer, dtype)

    def __call__(self, views: Tensor) -> SDROutput:
        """views: [B, V, 3, T, H, W], or [B, 3, T, H, W] for all branches; uint8, or normalised and of our dtype."""
        if not self.shared:
            tokens = backbone_tokens(views, self.backbones)
        elif views.ndim == 6:  # one backbone sees every view as a clip
            tokens = backbone_tokens(views.flatten(0, 1), self.backbones).unflatten(0, views.shape[:2]).squeeze(2)
        else:
            tokens = backbone_tokens(views, self.backbones).expand(-1, self.num_branches, -1, -1)
        joint, features, joint_logits, loo_logits = self.trfi(tokens)
        return SDROutput(self.transformer(joint), joint, features, joint_logits, loo_logits)
