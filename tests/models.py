"""Small models of the structure of every preset, no part of which is dead or trivial."""

from dataclasses import replace

import torch
from torch import nn

import sdr
from sdr import ftcn_released, paper, tiny

SMALL = {"num_frames": 8, "width": 8, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "mlp_dim": 48}
# the structure of every preset, narrow
CONFIGS = {
    "paper": replace(paper(), image_size=32, **SMALL),
    "ftcn_released": replace(ftcn_released(), image_size=16, **SMALL),
    "tiny": replace(tiny(), image_size=16, num_frames=4),
    "shared": replace(tiny(), image_size=16, num_frames=4, share_weights=True, joint_feature="mlp"),
    "one branch": replace(tiny(), image_size=16, num_frames=4, num_branches=1),
    "sum of three": replace(tiny(), image_size=16, num_frames=4, num_branches=3, joint_feature="sum", depth=2),
    "control": replace(tiny(), image_size=16, num_frames=4, temporal_kernels=False, joint_feature="mean"),
}


def random_model(config, device="cpu") -> sdr.SDRModel:
    """A model no part of which is dead or trivial: random batch statistics, gammas of both signs."""
    model = sdr.SDRModel(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval().to(device)


def random_views(config, *, batch=8, per_branch=True, device="cpu"):
    shape = (batch, config.num_branches) if per_branch else (batch,)
    return torch.randn(*shape, 3, config.num_frames, config.image_size, config.image_size, device=device)
