"""SDR's losses: cross-entropy, mutual information (KL of leave-one-out heads), supervised InfoNCE; all in float32."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdr.config import LossConfig
from sdr.model import SDROutput


def leave_one_out_kl(
    joint_logits: Tensor,
    loo_logits: Tensor,
    *,
    temperature: float = 1.5,
    detach_joint: bool = True,
    direction: str = "joint_to_loo",
    objective: str = "shared",
) -> Tensor:
    """L_MI: mean over clips of the sum over views of KL(P_Z || P_{Z without v}) (specification section 4).

    Args:
        joint_logits: [B, K].
        loo_logits: [B, V, K]; V = 0 gives 0.
        temperature: divides all logits before the softmax.
        detach_joint: stop the gradient into ``joint_logits``.
        direction: ``joint_to_loo``, or ``loo_to_joint`` for the reverse divergence.
        objective: ``shared`` returns the divergence, ``complementary`` the mean over clips of exp(-its sum).

    Returns:
        Scalar, float32 or wider.
    """
    dtype = torch.promote_types(joint_logits.dtype, torch.float32)
    if loo_logits.shape[1] == 0:
        return joint_logits.new_zeros((), dtype=dtype)
    log_joint = F.log_softmax(joint_logits.to(dtype) / temperature, -1).unsqueeze(1)  # [B, 1, K]
    log_loo = F.log_softmax(loo_logits.to(dtype) / temperature, -1)  # [B, V, K]
    if detach_joint:
        log_joint = log_joint.detach()
    log_p, log_q = (log_joint, log_loo) if direction == "joint_to_loo" else (log_loo, log_joint)
    divergence = (log_p.exp() * (log_p - log_q)).sum((1, 2))  # [B]
    return (torch.exp(-divergence) if objective == "complementary" else divergence).mean()


def info_nce(features: Tensor, labels: Tensor, *, temperature: float = 0.07, anchors: str = "all") -> Tensor:
    """L_con: supervised InfoNCE, the mean over positives outside the log (specification section 6).

    Args:
        features: [N, D]; normalised here.
        labels: [N] integers; rows with the same label are each other's positives.
        temperature: of the similarities.
        anchors: ``all``, or ``real`` for rows with label 0 alone; the others stay as negatives.

    Returns:
        Mean over the anchors, float32 or wider; an anchor without a positive contributes 0, no anchor gives 0.
    """
    features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    N = len(features)
    own = torch.eye(N, dtype=torch.bool, device=features.device)
    logits = (features @ features.T / temperature).masked_fill(own, -torch.inf)
    log_prob = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(own, 0)  # N = 1: -inf - -inf stays masked
    positive = (labels[:, None] == labels[None, :]) & ~own
    count = positive.sum(1)
    loss = -(log_prob * positive).sum(1) / count.clamp(min=1)
    anchor = labels == 0 if anchors == "real" else torch.ones_like(labels, dtype=torch.bool)
    return (loss * anchor).sum() / anchor.sum().clamp(min=1)


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

    def forward(self, output: SDROutput, labels: Tensor) -> Losses:
        """output: of the model; labels: [B], 1 = fake."""
        c = self.config
        V = output.features.shape[1]
        ce = F.binary_cross_entropy_with_logits(output.logits.float(), labels.float())
        mi = leave_one_out_kl(
            output.joint_logits,
            output.loo_logits,
            temperature=c.mi_temperature,
            detach_joint=c.detach_joint,
            direction=c.direction,
            objective=c.objective,
        )
        rows = labels.repeat_interleave(V)
        contrastive = info_nce(output.features.flatten(0, 1), rows, temperature=c.temperature, anchors=c.anchors)
        heads = torch.cat([output.joint_logits.unsqueeze(1), output.loo_logits], 1).float()  # [B, 1 + V, 2]
        aux = F.cross_entropy(heads.flatten(0, 1), labels.long().repeat_interleave(heads.shape[1]))
        parts = torch.stack([ce, mi, contrastive, aux])
        weights = parts.new_tensor([c.ce, c.mi, c.contrastive, c.aux])
        if c.weighting == "uncertainty":
            variance = self.scales.square()
            total = ((parts / (2 * variance) + torch.log1p(variance)) * (weights > 0)).sum()
        else:
            total = (weights * parts).sum()
        return Losses(total, *parts.unbind())
