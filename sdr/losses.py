"""SDR's loss: its parts, which sdr_kernels computes at once, and their weights."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdr.config import LossConfig
from sdr.model import SDROutput
from sdr_kernels import LossOptions, sdr_loss


class Losses(NamedTuple):
    """Scalars; ``total`` is the one to differentiate, the parts are unweighted."""

    total: Tensor
    ce: Tensor
    mi: Tensor
    contrastive: Tensor
    aux: Tensor


class SDRLoss(nn.Module):
    """L = a L_CE + b L_MI + c L_con + aux, or their uncertainty weighting with learnable s_i."""

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        if self.config.weighting == "uncertainty":
            self.scales = nn.Parameter(torch.ones(4))  # s_i of ce, mi, contrastive, aux

    def forward(self, output: SDROutput, labels: Tensor, group: "dist.ProcessGroup | None" = None) -> Losses:
        """output: of the model; labels: [B], 1 = fake; group: processes whose features InfoNCE compares."""
        c = self.config
        options = LossOptions(*(getattr(c, field) for field in LossOptions._fields))
        heads = output.joint_logits, output.loo_logits
        parts = sdr_loss(output.features, labels, output.logits, *heads, options, group=group)
        weights = c.ce, c.mi, c.contrastive, c.aux  # numbers: a tensor of them would wait for the GPU
        if c.weighting == "uncertainty":
            variance = self.scales.square()
            terms = (parts / (2 * variance) + torch.log1p(variance)).unbind()
            weighted = [term for term, weight in zip(terms, weights, strict=True) if weight > 0]
        else:
            weighted = [weight * part for part, weight in zip(parts.unbind(), weights, strict=True)]
        total = sum(weighted, start=parts.new_zeros(()))
        return Losses(total, *parts.unbind())
