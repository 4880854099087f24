"""Batch statistics of V branches, and what a batch norm does to rows and their gradients, from sums over rows alone.

The formulas are derived in ``docs/batch_norm.md``. Small matrices are float64: the sums that they are made of are
exact to float32, and the differences between them must not lose that.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_floating, check_same, check_shape

BN_MODES = ("batch", "frozen", "sync")


class NormedConv(NamedTuple):
    """A convolution of V branches and the batch norm after it."""

    weight: Tensor  # [V, C_out, C_in, k]
    gamma: Tensor  # [V, C_out]
    beta: Tensor  # [V, C_out]
    running_mean: Tensor | None = None  # [V, C_out]; read where the norm is frozen
    running_var: Tensor | None = None
    eps: float = 1e-5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:-1]


class Statistics(NamedTuple):
    """Of what a convolution put out, over the batch of all processes that share it."""

    mean: Tensor  # [V, C_out], float64
    var: Tensor  # [V, C_out], float64, biased
    rows: int  # of one branch: clips times frames times positions


class Normed(NamedTuple):
    """What a layer returns in training."""

    out: Tensor
    statistics: list[Statistics]  # of each batch norm, in the order of the arguments; none where they are frozen


class Norm(NamedTuple):
    """A batch norm whose statistics are known; all [V, C]."""

    mean: Tensor  # float64
    rstd: Tensor  # float64
    factor: Tensor  # gamma * rstd, float64
    scale: Tensor  # the rest as kernels take it: z * scale + shift
    shift: Tensor
    center: Tensor  # the mean

    @classmethod
    def of(cls, conv: NormedConv, mean: Tensor, var: Tensor, dtype: torch.dtype) -> "Norm":
        """mean, var: [V, C], float64; dtype: of the values for kernels."""
        rstd = (var + conv.eps).rsqrt()
        factor = conv.gamma.double() * rstd
        scale, shift, center = torch.stack([factor, conv.beta.double() - mean * factor, mean]).to(dtype)
        return cls(mean, rstd, factor, scale, shift, center)


class Batch(NamedTuple):
    """The rows that statistics are of."""

    rows: int  # of all processes, for each branch
    group: "dist.ProcessGroup | None"  # the processes; None where it is this one alone

    @classmethod
    def of(cls, rows: int, group: "dist.ProcessGroup | None") -> "Batch":
        return cls(rows if group is None else rows * dist.get_world_size(group), group)

    def moments(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all processes' rows from each one's own, [V, 2, C]; all have as many rows."""
        if self.group is None:
            return local.unbind(1)
        everyone = local.new_empty((dist.get_world_size(self.group), *local.shape))
        dist.all_gather(list(everyone), local.contiguous(), group=self.group)
        means, variances = everyone.unbind(2)
        mean = means.mean(0)
        return mean, (variances + (means - mean).square()).mean(0)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.group is None:
            return sums
        sums = sums.clone()
        dist.all_reduce(sums, group=self.group)
        return sums


class NormGradient(NamedTuple):
    """Gradients of a batch norm's own parameters, and what its input's gradient needs; [V, C], float64."""

    dgamma: Tensor
    dbeta: Tensor
    factor: Tensor  # of the gradient that comes
    slope: Tensor  # of the input less its mean
    offset: Tensor

    @classmethod
    def of(cls, norm: Norm, batch: Batch | None, sums: Tensor) -> "NormGradient":
        """sums: [V, 2, C], over this process's rows, of the gradient that comes and of it times (z - mean); batch: None
        where the norm is frozen.
        """
        dbeta, centered = sums.unbind(1)
        if batch is None:
            zero = torch.zeros_like(norm.factor)
            return cls(norm.rstd * centered, dbeta, norm.factor, zero, zero)
        shift, slope = (batch.total(sums) / -batch.rows).unbind(1)
        slope = norm.factor * norm.rstd.square() * slope
        return cls(norm.rstd * centered, dbeta, norm.factor, slope, norm.factor * shift)

    def coef(self, norm: Norm) -> Tensor:
        """As gradient rows take it, [4, V, C]."""
        return torch.stack([self.factor, self.slope, self.offset, norm.mean]).to(norm.center.dtype)


class Gram(NamedTuple):
    """Moments of what a pointwise convolution reads, h, from which those of z = h @ weight need no rows."""

    weight: Tensor  # [V, C_in, C_out], float64, of the values that rows are multiplied with
    covariance: Tensor | None = None  # [V, C_in, C_in], of this process's rows; none where the norm is frozen
    local_mean: Tensor | None = None  # [V, C_in], of this process's rows
    mean: Tensor | None = None  # [V, C_in], of all processes' rows
    rows: int = 0  # of this process

    @classmethod
    def of(cls, weight: Tensor, covariance: Tensor, local_mean: Tensor, batch: Batch, rows: int) -> "Gram":
        mean = batch.total(local_mean) * (rows / batch.rows)
        return cls(weight.double(), covariance, local_mean, mean, rows)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """z's mean and biased variance over all processes, [V, C_out]."""
        var = (self.covariance @ self.weight * self.weight).sum(1).clamp(min=0)
        return batch.moments(torch.stack([(self.local_mean[:, None] @ self.weight)[:, 0], var], 1))

    def gradient_sums(self, norm: Norm, products: Tensor, dsums: Tensor) -> Tensor:
        """NormGradient's sums.

        Args:
            norm: of z.
            products: [V, C_in, C_out], sums of h - mean, or of h where the norm is frozen, times the gradient.
            dsums: [V, C_out], of the gradient.
        """
        centered = (self.weight * products).sum(1)
        return torch.stack([dsums, centered if self.covariance is not None else centered - norm.mean * dsums], 1)

    def dweight(self, gradient: NormGradient, batch: Batch | None, products: Tensor, dsums: Tensor) -> Tensor:
        """Of the weight, [V, C_in, C_out]; arguments as :meth:`gradient_sums`'."""
        through = gradient.factor[:, None] * products
        if self.covariance is None:
            return through
        through = through + gradient.slope[:, None] * self.rows * (self.covariance @ self.weight)
        if batch.group is None:
            return through
        # the means of one process's rows are not the batch's, nor do its gradients of z sum to 0
        off = self.local_mean - self.mean
        z_off = self.rows * (off[:, None] @ self.weight)[:, 0]  # sums of z - mean
        dz = gradient.factor * dsums + gradient.slope * z_off + gradient.offset * self.rows  # sums of z's gradient
        shift = gradient.slope * z_off + self.rows * gradient.offset
        return through + off[..., None] * shift[:, None] + self.mean[..., None] * dz[:, None]

    def dinput(self, gradient: NormGradient) -> tuple[Tensor, Tensor, Tensor]:
        """h's gradient is du @ the first, [V, C_out, C_in], + (h - mean) @ the second, [V, C_in, C_in], + the third."""
        transposed = self.weight.transpose(-1, -2)
        return (
            gradient.factor[..., None] * transposed,
            self.weight @ (gradient.slope[..., None] * transposed),
            (gradient.offset[:, None] @ transposed)[:, 0],
        )


def in_dtype(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter's gradient as it is returned: contiguous, for whoever sums them over processes."""
    return None if gradient is None else gradient.to(dtype, memory_format=torch.contiguous_format)


def process_group(bn: str, group: "dist.ProcessGroup | None") -> "dist.ProcessGroup | None":
    """The processes whose rows count; None for this one alone.

    Raises:
        ValueError: ``bn`` is no mode, or asks for processes that there are not, or a group goes with another mode.
    """
    if bn not in BN_MODES:
        raise ValueError(f"bn must be one of {', '.join(BN_MODES)}, got {bn!r}")
    if bn != "sync":
        if group is not None:
            raise ValueError(f"group must be given with bn='sync' alone, got it with bn={bn!r}")
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("bn must not be 'sync' before torch.distributed is initialised")
    return dist.group.WORLD if group is None else group


def check_normed(name: str, conv: NormedConv, x: Tensor, rows: int, bn: str) -> None:
    """Raise unless the norm's tensors fit the weight, and there is more than one row to take statistics of."""
    shape = conv.weight.shape[:2]
    fields = {f"{name}'s {field}": value for field, value in zip(conv._fields, conv.tensors, strict=False)}
    check_floating(**fields)
    check_same("device", x, **fields)
    for field, value in zip(conv._fields[1:], conv.tensors[1:], strict=False):
        if value is not None:
            check_shape(f"{name}'s {field}", value, shape, "[V, C_out]")
        elif bn == "frozen":
            raise ValueError(f"{name}'s {field} must be given where bn is frozen")
    if bn != "frozen" and rows < 2:
        raise ValueError(f"{name} must put out more than one row to take statistics of, got {list(x.shape)} for x")


def batch_norm_reference(
    z: Tensor, conv: NormedConv, bn: str, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, list[Statistics]]:
    """The definition: every branch of z, [B, V, C, T, H, W], through PyTorch's batch norm."""
    outs, moments = [], []
    for v, branch in enumerate(z.unbind(1)):
        gamma, beta = conv.gamma[v], conv.beta[v]
        if bn == "frozen":
            outs.append(F.batch_norm(branch, conv.running_mean[v], conv.running_var[v], gamma, beta, eps=conv.eps))
            continue
        found = _moments(branch, group)
        moments.append(torch.stack(found).detach().double())
        if group is None:
            outs.append(F.batch_norm(branch, None, None, gamma, beta, training=True, eps=conv.eps))
        else:
            mean, var, gamma, beta = (value.view(-1, 1, 1, 1) for value in (*found, gamma, beta))
            outs.append(((branch - mean) * (var + conv.eps).rsqrt() * gamma + beta).to(branch.dtype))
    rows = Batch.of(z[:, 0, 0].numel(), group).rows
    return torch.stack(outs, 1), [Statistics(*torch.stack(moments, 1), rows)] if moments else []


def _moments(x: Tensor, group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of [B, C, T, H, W] over all processes, in float32 or wider, differentiable."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if group is None:
        var, mean = torch.var_mean(x, (0, 2, 3, 4), correction=0)
        return mean, var
    from torch.distributed.nn.functional import all_reduce

    count = dist.get_world_size(group)
    mean = all_reduce(x.mean((0, 2, 3, 4)), group=group) / count
    return mean, all_reduce((x - mean.view(-1, 1, 1, 1)).square().mean((0, 2, 3, 4)), group=group) / count
