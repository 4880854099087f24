"""Ops for temporal-only convolution networks: every op has a plain PyTorch reference and faster implementations."""

from sdr_kernels.batch_norm import Normed, NormedConv, Statistics
from sdr_kernels.clip_views import clip_views
from sdr_kernels.info_nce import info_nce
from sdr_kernels.leave_one_out_kl import leave_one_out_kl
from sdr_kernels.norm_linear import norm_linear
from sdr_kernels.normed_bottleneck import NormedBottleneck, normed_bottleneck
from sdr_kernels.normed_stem import normed_stem
from sdr_kernels.sdr_loss import LossOptions, sdr_loss
from sdr_kernels.spatial_mean import spatial_mean
from sdr_kernels.temporal_bottleneck import FoldedBottleneck, FoldedConv, bottleneck_chain, temporal_bottleneck
from sdr_kernels.temporal_conv3d import temporal_conv3d
from sdr_kernels.temporal_stem import temporal_stem
from sdr_kernels.token_attention import token_attention

__all__ = [
    "FoldedBottleneck",
    "FoldedConv",
    "LossOptions",
    "Normed",
    "NormedBottleneck",
    "NormedConv",
    "Statistics",
    "bottleneck_chain",
    "clip_views",
    "info_nce",
    "leave_one_out_kl",
    "norm_linear",
    "normed_bottleneck",
    "normed_stem",
    "sdr_loss",
    "spatial_mean",
    "temporal_bottleneck",
    "temporal_conv3d",
    "temporal_stem",
    "token_attention",
]
