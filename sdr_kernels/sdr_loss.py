"""SDR's losses at once: cross-entropies, mutual information and InfoNCE, values and gradients in one launch."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_floating, differentiable_once, register, select_impl
from sdr_kernels.info_nce import check_features, check_temperature, info_nce, info_nce_reference
from sdr_kernels.leave_one_out_kl import check_logits, leave_one_out_kl_reference, why_too_large, why_unfit

MAX_ROWS = {"triton": 64, "cuda": 128}  # of features whose similarities fit one program; the paper's batch has 64


class LossOptions(NamedTuple):
    """How the parts are defined; see :func:`sdr_kernels.info_nce` and :func:`sdr_kernels.leave_one_out_kl`."""

    temperature: float = 0.07
    mi_temperature: float = 1.5
    anchors: str = "all"
    detach_joint: bool = True
    direction: str = "joint_to_loo"
    objective: str = "shared"

    @property
    def arguments(self) -> tuple[float, float, bool, bool, bool, bool]:
        """As the launchers take them."""
        flags = self.anchors == "real", self.detach_joint, self.direction == "loo_to_joint"
        return self.temperature, self.mi_temperature, *flags, self.objective == "complementary"


def sdr_loss_reference(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    joint_logits: Tensor,
    loo_logits: Tensor,
    options: LossOptions = LossOptions(),  # noqa: B008 - it is immutable
) -> Tensor:
    """The definitions, in float32 or wider."""
    V, D = features.shape[1:]
    o = options
    wide = torch.promote_types(features.dtype, torch.float32)
    ce = F.binary_cross_entropy_with_logits(logits.to(wide), labels.to(wide))
    mi = leave_one_out_kl_reference(
        joint_logits, loo_logits, o.mi_temperature, o.detach_joint, o.direction, o.objective
    )
    rows = labels.repeat_interleave(V)
    contrastive = info_nce_reference(features.flatten(0, 1), rows, o.temperature, o.anchors) if D else ce.new_zeros(())
    heads = torch.cat([joint_logits.unsqueeze(1), loo_logits], 1).to(wide)  # [B, 1 + V, K]
    aux = F.cross_entropy(heads.flatten(0, 1), labels.long().repeat_interleave(heads.shape[1]))
    return torch.stack([ce, mi, contrastive, aux])


def empty_results(features: Tensor, joint_logits: Tensor, loo_logits: Tensor) -> tuple[Tensor, ...]:
    """Unwritten parts, dfeatures, dlogits, djoint and dloo, as a launcher of ``sdr_loss_fwd`` returns them."""
    B, V, D = features.shape
    shapes = (4,), (B * V, D), (B,), (2, *joint_logits.shape), (2, *loo_logits.shape)
    return tuple(features.new_empty(shape, dtype=torch.float32) for shape in shapes)


# the parts, and their gradients: of the contrastive loss in features, of ce in logits, of mi and of aux in the rest
_fwd = register(
    "sdr_loss",
    "sdr_loss_fwd",
    "(Tensor features, Tensor labels, Tensor logits, Tensor joint_logits, Tensor loo_logits, float temperature, "
    "float mi_temperature, bool real_anchors, bool detach_joint, bool reverse, bool complementary, str impl) -> "
    "(Tensor parts, Tensor dfeatures, Tensor dlogits, Tensor djoint, Tensor dloo)",
    fake=lambda features, labels, logits, joint, loo, *_: empty_results(features, joint, loo),
)


class _SDRLoss(torch.autograd.Function):
    """The forward computes the gradients as well, of weight 1 and in float32; backward scales them."""

    @staticmethod
    def forward(ctx, features, labels, logits, joint_logits, loo_logits, *arguments):
        parts, *gradients = _fwd(features, labels, logits, joint_logits, loo_logits, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = features.dtype, logits.dtype, joint_logits.dtype, loo_logits.dtype
        ctx.shape = features.shape
        return parts

    @staticmethod
    @differentiable_once
    def backward(ctx, dparts):
        dfeatures, dlogits, djoint, dloo = ctx.saved_tensors
        heads = ((dparts[1::2, None] * d.flatten(1)).sum(0).view(d.shape[1:]) for d in (djoint, dloo))
        gradients = (dparts[2] * dfeatures).view(ctx.shape), dparts[0] * dlogits, *heads
        dfeatures, dlogits, djoint, dloo = (g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dfeatures, None, dlogits, djoint, dloo, *[None] * 7


def sdr_loss(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    joint_logits: Tensor,
    loo_logits: Tensor,
    options: LossOptions = LossOptions(),  # noqa: B008 - it is immutable
    *,
    group: "dist.ProcessGroup | None" = None,
    impl: str = "auto",
) -> Tensor:
    """The parts of SDR's loss, differentiable in all but ``labels``.

    - ce: binary cross-entropy of ``logits``;
    - mi: :func:`sdr_kernels.leave_one_out_kl`;
    - contrastive: :func:`sdr_kernels.info_nce` of all rows of ``features``, each with its clip's label;
    - aux: cross-entropy of the joint and the leave-one-out logits.

    Up to 64 rows of features take one launch for values and gradients (128 in CUDA); more take info_nce's own.

    Args:
        features: [B, V, D], B clips by V views, float32, float16 or bfloat16 (the reference takes float64 too).
        labels: [B], 0 = real and 1 = fake, any integer type or bool. On a GPU others are not looked for, which would
            wait for it: they give wrong losses.
        logits: [B], of a fake.
        joint_logits: [B, K], K classes of at least 2, class 1 = fake.
        loo_logits: [B, W, K], one for each view left out; W = 0 for a single view. joint_logits' dtype.
        options: temperatures and readings of the parts.
        group: processes whose rows of features join, see :func:`sdr_kernels.info_nce`.
        impl: "auto" (Triton on CUDA, else the reference, with the contrastive part by info_nce's own "auto"),
            "reference", "triton" or "cuda" (up to 128 rows).

    Returns:
        [4], ce, mi, contrastive and aux, float32 or wider.

    Raises:
        ValueError: a rank, shape, device, temperature or name is wrong, or a label on a CPU is neither 0 nor 1.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here or on this size.
    """
    check_sdr_loss(features, labels, logits, joint_logits, loo_logits, options)
    V = features.shape[1]
    num_rows = features.shape[0] * V
    no_cuda = ""
    if group is not None or num_rows > MAX_ROWS["cuda"]:
        no_cuda = f"features must have at most {MAX_ROWS['cuda']} rows, B * V, got {num_rows}, and no group"
    unfit = why_unfit_batch(features, logits, joint_logits) or why_too_large(loo_logits=loo_logits)
    if num_rows <= MAX_ROWS["cuda"]:  # every program walks over all of their features
        unfit = unfit or why_too_large(features=features)
    chosen = select_impl(impl, features, op="sdr_loss", unfit=unfit, no_cuda=no_cuda)
    # "auto" leaves the N x N matrix to kernels that fit it, and else to info_nce, which has none
    whole = group is None and (impl == "reference" or num_rows <= MAX_ROWS.get(chosen, 0))
    tensors = labels, logits, joint_logits, loo_logits
    within = features if whole else features[..., :0]  # whose contrastive loss is 0
    if chosen == "reference":
        parts = sdr_loss_reference(within, *tensors, options)
    else:
        parts = _SDRLoss.apply(within, *tensors, *options.arguments, chosen)
    if whole:
        return parts
    rows = labels.repeat_interleave(V)
    choices = {"temperature": options.temperature, "anchors": options.anchors, "group": group, "impl": impl}
    contrastive = info_nce(features.flatten(0, 1), rows, **choices)
    return torch.cat([parts[:2], contrastive[None], parts[3:]])


def check_sdr_loss(
    features: Tensor, labels: Tensor, logits: Tensor, joint_logits: Tensor, loo_logits: Tensor, options: LossOptions
) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_features(features, labels, "[B, V, D]", options.temperature, options.anchors)
    B = features.shape[0]
    if min(features.shape) < 1:
        raise ValueError(f"features must be [B, V, D] with none 0, got {list(features.shape)}")
    check_floating(logits=logits)
    check_logits(joint_logits, loo_logits, options.direction, options.objective)
    check_temperature("mi_temperature", options.mi_temperature)
    if logits.shape != (B,):
        raise ValueError(f"logits must be [B] = [{B}] to fit features, got {list(logits.shape)}")
    if joint_logits.shape[0] != B or joint_logits.shape[1] < 2:
        raise ValueError(f"joint_logits must be [B, K] = [{B}, K], K of at least 2, got {list(joint_logits.shape)}")
    for name, tensor in {"logits": logits, "joint_logits": joint_logits}.items():
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on features' device, {features.device}, got {tensor.device}")
    # on a GPU this would wait for it, and in a trace there are no values
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != 0) & (labels != 1)]
        if wrong.shape[0]:
            raise ValueError(f"labels must be 0 (real) or 1 (fake), got {wrong[0].item()}")


def why_unfit_batch(features: Tensor, logits: Tensor, joint_logits: Tensor) -> str:
    """Why there is no kernel for these inputs; empty where there is one."""
    for name, tensor in {"features": features, "logits": logits}.items():
        if tensor.dtype == torch.float64:
            return f"{name} must not be float64"
    return why_unfit(joint_logits)
