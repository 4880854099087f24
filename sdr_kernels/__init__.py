"""Ops for temporal-only convolution networks: every op has a plain PyTorch reference and faster implementations."""

from sdr_kernels.norm_linear import norm_linear
from sdr_kernels.spatial_mean import spatial_mean
from sdr_kernels.temporal_bottleneck import FoldedBottleneck, FoldedConv, bottleneck_chain, temporal_bottleneck
from sdr_kernels.temporal_conv3d import temporal_conv3d
from sdr_kernels.temporal_stem import temporal_stem
from sdr_kernels.token_attention import token_attention

__all__ = [
    "FoldedBottleneck",
    "FoldedConv",
    "bottleneck_chain",
    "norm_linear",
    "spatial_mean",
    "temporal_bottleneck",
    "temporal_conv3d",
    "temporal_stem",
    "token_attention",
]
