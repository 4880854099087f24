"""Batch norm over the clips of all processes, on any device.

PyTorch's own SyncBatchNorm refuses CPU tensors, and on a GPU it waits for the device in every layer.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SyncNorm(torch.autograd.Function):
    """Normalise x [B, C, T, H, W] by statistics of all ranks, whose parts are of one size."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x.float(), (0, 2, 3, 4), correction=0)
        parts = mean.new_empty(dist.get_world_size(), 2, len(mean))
        dist.all_gather(list(parts), torch.stack([mean, var]))
        mean, within = parts[:, 0].mean(0), parts[:, 1].mean(0)
        var = within + (parts[:, 0] - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, _mean, _var):
        x, weight, mean, scale = ctx.saved_tensors
        shape = (1, -1, 1, 1, 1)
        normed = (x.float() - mean.view(shape)) * scale.view(shape)
        dout32 = dout.float()
        dbias, dweight = dout32.sum((0, 2, 3, 4)), (dout32 * normed).sum((0, 2, 3, 4))
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums)
        shift, slope = sums.view(2, *shape) / (dist.get_world_size() * (x.numel() // x.shape[1]))
        dx = (dout32 - shift - normed * slope) * (scale * weight).view(shape)
        return dx.to(x.dtype), dweight, dbias, None


class SyncBatchNorm3d(nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` whose batch is that of all processes; every process must give as many clips."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, T, H, W]."""
        if not self.training:
            return super().forward(x)
        out, mean, var = _SyncNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = dist.get_world_size() * (x.numel() // x.shape[1])
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return out
