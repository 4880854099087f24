"""Ops for temporal-only convolution networks: every op has a plain PyTorch reference and faster implementations."""

from sdr_kernels.temporal_bottleneck import FoldedConv, temporal_bottleneck
from sdr_kernels.temporal_conv3d import temporal_conv3d

__all__ = ["FoldedConv", "temporal_bottleneck", "temporal_conv3d"]
