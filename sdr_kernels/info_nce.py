"""Supervised InfoNCE: rows of one label attract each other, all others repel; no N x N matrix in memory."""

import torch
import torch.distributed as dist
from torch import Tensor

from sdr_kernels._ops import check_floating, differentiable_once, register, select_impl

ANCHORS = ("all", "real")
MIN_TEMPERATURE = 1e-6  # cosines over less leave float32's range
ZERO_NORM = 1e-12  # a shorter row has no direction: it is similar to none and gets no gradient


def normalise(features: Tensor) -> Tensor:
    """Rows of length 1 in float32 or wider; rows shorter than ``ZERO_NORM`` become 0."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return torch.where(norm < ZERO_NORM, 0, features / norm.clamp(min=ZERO_NORM))


def info_nce_reference(features: Tensor, labels: Tensor, temperature: float = 0.07, anchors: str = "all") -> Tensor:
    """The definition, with the N x N matrix, in float32 or wider."""
    unit = normalise(features)
    own = torch.eye(unit.shape[0], dtype=torch.bool, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):  # which would multiply in half precision
        logits = (unit @ unit.T / temperature).masked_fill(own, -torch.inf)
    log_prob = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(own, 0)  # N = 1: -inf - -inf stays masked
    positive = (labels[:, None] == labels[None, :]) & ~own
    count = positive.sum(1)
    # no products with 0 or 1: what is not finite counts where it is asked for, and nowhere else
    loss = -log_prob.where(positive, 0).sum(1) / count.clamp(min=1)
    anchor = labels == 0 if anchors == "real" else torch.ones_like(labels, dtype=torch.bool)
    return loss.where(anchor, 0).sum() / anchor.sum().clamp(min=1)


def _fake_fwd(features, labels, temperature, real_anchors):
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty((), dtype=dtype), features.new_empty((4, features.shape[0]), dtype=torch.float64)


# rows: what the backward needs of every row, each implementation's own, as wide as the CPU's
_fwd = register(
    "info_nce",
    "info_nce_fwd",
    "(Tensor features, Tensor labels, float temperature, bool real_anchors, str impl) -> (Tensor loss, Tensor rows)",
    fake=_fake_fwd,
)
_bwd = register(
    "info_nce",
    "info_nce_bwd",
    "(Tensor features, Tensor labels, Tensor rows, Tensor dloss, float temperature, str impl) -> Tensor",
    fake=lambda features, labels, rows, dloss, temperature: features.new_empty(features.shape),
)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, labels, temperature, real_anchors, impl):
        loss, rows = _fwd(features, labels, temperature, real_anchors, impl)
        ctx.save_for_backward(features, labels, rows)
        ctx.temperature, ctx.impl = temperature, impl
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, dloss):
        return _bwd(*ctx.saved_tensors, dloss, ctx.temperature, ctx.impl), None, None, None, None


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, in order of rank; the gradient is of the own ones."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty((dist.get_world_size(group), *x.shape))
        dist.all_gather(list(out), x.contiguous(), group=group)
        return out.flatten(0, 1)

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        return dout.tensor_split(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


class _SumOfLosses(torch.autograd.Function):
    """Every rank has the same loss, so what all of them ask of a row is what one asks, times the sum of their dloss."""

    @staticmethod
    def forward(ctx, loss, group):
        ctx.group = group
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx, dloss):
        dloss = dloss.clone()
        dist.all_reduce(dloss, group=ctx.group)
        return dloss, None


def info_nce(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    anchors: str = "all",
    group: "dist.ProcessGroup | None" = None,
    impl: str = "auto",
) -> Tensor:
    """Supervised contrastive loss, the mean over positives outside the logarithm, differentiable in ``features``.

    ``-1/A sum_i 1/|P_i| sum_{p in P_i} log(exp(s_ip) / sum_{j != i} exp(s_ij))``, s the cosines over the
    temperature: L_sup_out of Khosla et al. (NeurIPS 2020). Kernels and the CPU's own implementation walk over tiles of
    the matrix with running sums, in O(N D) memory.

    Args:
        features: [N, D], float32, float16 or bfloat16 (the reference and the CPU take float64 too); normalised here, a
            row of length 0 stays 0. A row's squared length must not leave float32's range.
        labels: [N], any integer type or bool; rows with the same label are each other's positives.
        temperature: of the similarities, at least 1e-6.
        anchors: "all", or "real" for rows with label 0 alone; the others stay as negatives.
        group: processes whose rows join. Each gets the loss of all, and for its own rows the sum of all ranks'
            gradients, so that DDP's mean over ranks is the gradient of that loss. Every rank must give as many rows and
            call backward as often: where one does not, collectives hang or abort.
        impl: "auto" (Triton on CUDA, else the CPU's own), "reference", "cpu" or "triton".

    Returns:
        Scalar, float32 or wider: the mean over the anchors. An anchor without a positive adds 0; no anchor gives 0.

    Raises:
        ValueError: a rank, shape, device, temperature or name is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here.
    """
    check_features(features, labels, "[N, D]", temperature, anchors)
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("group must have this process in it")
    impl = select_impl(
        impl, features, has_cpu=True, no_tile="features must not be float64" * (features.dtype == torch.float64)
    )
    if group is not None:
        features = _GatherRows.apply(features, group)
        labels = _GatherRows.apply(labels.long(), group)  # collectives do not know every type
    if impl == "reference":
        loss = info_nce_reference(features, labels, temperature, anchors)
    else:
        loss = _InfoNCE.apply(features, labels, temperature, anchors == "real", impl)
    return loss if group is None else _SumOfLosses.apply(loss, group)


def check_features(features: Tensor, labels: Tensor, axes: str, temperature: float, anchors: str) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came; axes: of features, "[N, D]"."""
    check_floating(features=features)
    if features.ndim != axes.count(",") + 1 or features.shape[-1] < 1:
        raise ValueError(f"features must be {axes} with D at least 1, got {list(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be {list(features.shape[:1])} to fit features, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.device != features.device:
        raise ValueError(f"labels must be on features' device, {features.device}, got {labels.device}")
    check_temperature("temperature", temperature)
    if anchors not in ANCHORS:
        raise ValueError(f"anchors must be one of {', '.join(ANCHORS)}, got {anchors!r}")


def check_temperature(name: str, temperature: float) -> None:
    """Raise unless it is a number that float32 can divide by."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"{name} must be a number, got {temperature!r}")
    if not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"{name} must be at least {MIN_TEMPERATURE} and finite, got {temperature}")
