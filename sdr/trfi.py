"""Task-Relevant Feature Integration (TRFI): V branches' tokens to one joint token sequence, with the heads of L_MI."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr.config import SDRConfig


class TRFIOutput(NamedTuple):
    """The branches' tokens, joined.

    Attributes:
        tokens: [B, N, D], joint feature of each time step.
        features: [B, V, C], each branch's mean over time.
        joint_logits: [B, 2], real and fake, from all views.
        loo_logits: [B, V, 2], row v from all views but v; [B, 0, 2] for one branch.
    """

    tokens: Tensor
    features: Tensor
    joint_logits: Tensor
    loo_logits: Tensor


class TRFI(nn.Module):
    """Joint feature per time step, a joint head on all views, and one leave-one-out head per view.

    The heads follow Ba et al., "Exposing the Deception: Uncovering More Forgery Clues for Deepfake Detection", AAAI
    2024. One branch has nothing to leave out: its leave-one-out logits are empty.
    """

    def __init__(self, config: SDRConfig) -> None:
        super().__init__()
        V, C, D = config.num_branches, config.backbone_channels, config.embed_dim
        self.joint_feature = config.joint_feature
        if config.joint_feature in ("mean", "sum") or V == 1:
            self.proj = nn.Linear(C, D) if C != D else nn.Identity()
        elif config.joint_feature == "linear":
            self.proj = nn.Linear(V * C, D)
        else:
            self.proj = nn.Sequential(nn.Linear(V * C, D), nn.GELU(), nn.Linear(D, D))
        self.joint_head = nn.Linear(V * C, 2)
        self.loo_heads = nn.ModuleList(nn.Linear((V - 1) * C, 2) for _ in range(V if V > 1 else 0))

    def forward(self, branch_tokens: Tensor) -> TRFIOutput:
        """branch_tokens: [B, V, N, C]."""
        B, V, _, C = branch_tokens.shape
        if self.joint_feature == "mean":
            joint = branch_tokens.mean(1)
        elif self.joint_feature == "sum":
            joint = branch_tokens.sum(1)
        else:
            joint = branch_tokens.transpose(1, 2).flatten(2)  # [B, N, V * C]
        features = branch_tokens.mean(2)  # [B, V, C]
        # slices: an index made of a list is a copy that waits for the GPU
        rest = [torch.cat([features[:, :v], features[:, v + 1 :]], 1).flatten(1) for v in range(V)]
        loo = [head(rest[v]) for v, head in enumerate(self.loo_heads)]
        return TRFIOutput(
            tokens=self.proj(joint),
            features=features,
            joint_logits=self.joint_head(features.reshape(B, V * C)),
            loo_logits=torch.stack(loo, 1) if loo else features.new_empty(B, 0, 2),
        )
