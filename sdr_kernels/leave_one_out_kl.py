"""How far each view's absence moves the joint prediction: the mutual-information loss of leave-one-out heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdr_kernels._ops import check_floating, differentiable_once, register, select_impl
from sdr_kernels.info_nce import check_temperature

MAX_CLASSES = 16  # of the kernels
MAX_ELEMENTS = 2**31  # of a tensor that a single program walks over
DIRECTIONS = ("joint_to_loo", "loo_to_joint")
OBJECTIVES = ("shared", "complementary")


def leave_one_out_kl_reference(
    joint_logits: Tensor,
    loo_logits: Tensor,
    temperature: float = 1.5,
    detach_joint: bool = True,
    direction: str = "joint_to_loo",
    objective: str = "shared",
) -> Tensor:
    """The definition, in float32 or wider."""
    dtype = torch.promote_types(joint_logits.dtype, torch.float32)
    if loo_logits.shape[1] == 0:
        return joint_logits.new_zeros((), dtype=dtype)
    log_joint = F.log_softmax(joint_logits.to(dtype) / temperature, -1).unsqueeze(1)  # [B, 1, K]
    log_loo = F.log_softmax(loo_logits.to(dtype) / temperature, -1)  # [B, V, K]
    if detach_joint:
        log_joint = log_joint.detach()
    log_p, log_q = (log_joint, log_loo) if direction == "joint_to_loo" else (log_loo, log_joint)
    divergence = (log_p.exp() * (log_p - log_q)).sum((1, 2))  # [B]
    divergence = divergence - divergence.detach().clamp(max=0)  # rounding can leave it below 0
    return (torch.exp(-divergence) if objective == "complementary" else divergence).mean()


_fwd = register(
    "leave_one_out_kl",
    "leave_one_out_kl_fwd",
    "(Tensor joint_logits, Tensor loo_logits, float temperature, bool detach_joint, bool reverse, bool complementary, "
    "str impl) -> (Tensor value, Tensor djoint, Tensor dloo)",
    fake=lambda joint, loo, *_: tuple(joint.new_empty(s, dtype=torch.float32) for s in ((), joint.shape, loo.shape)),
)


class _LeaveOneOutKL(torch.autograd.Function):
    """The forward computes the gradients as well: they take no other launch, and backward only scales them."""

    @staticmethod
    def forward(ctx, joint_logits, loo_logits, *arguments):
        value, djoint, dloo = _fwd(joint_logits, loo_logits, *arguments)
        ctx.save_for_backward(djoint, dloo)
        _, ctx.detach_joint, *_ = arguments
        ctx.dtype = joint_logits.dtype
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx, dvalue):
        djoint, dloo = ((dvalue * saved).to(ctx.dtype) for saved in ctx.saved_tensors)
        return None if ctx.detach_joint else djoint, dloo, None, None, None, None, None


def leave_one_out_kl(
    joint_logits: Tensor,
    loo_logits: Tensor,
    *,
    temperature: float = 1.5,
    detach_joint: bool = True,
    direction: str = "joint_to_loo",
    objective: str = "shared",
    impl: str = "auto",
) -> Tensor:
    """L_MI: mean over clips of the sum over views of KL(P_Z || P_{Z without v}), differentiable in both arguments.

    P are softmaxes of logits over the temperature (SDR's L_MI after Ba et al., "Exposing the Deception", AAAI 2024).

    Args:
        joint_logits: [B, K], B and K at least 1; float32, float16 or bfloat16 (the reference takes float64 too).
        loo_logits: [B, V, K] of joint_logits' dtype, row v from all views but v; V = 0 gives 0.
        temperature: divides all logits before the softmax, at least 1e-6.
        detach_joint: no gradient into ``joint_logits``.
        direction: "joint_to_loo", or "loo_to_joint" for the reverse divergence.
        objective: "shared" gives the divergence, "complementary" the mean over clips of exp(-its sum).
        impl: "auto" (Triton on CUDA, else the reference), "reference" or "triton".

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: a rank, shape, device, temperature or name is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here.
    """
    check_logits(joint_logits, loo_logits, direction, objective)
    check_temperature("temperature", temperature)
    unfit = why_unfit(joint_logits) or why_too_large(loo_logits=loo_logits)
    impl = select_impl(impl, joint_logits, unfit=unfit)
    if impl == "reference":
        return leave_one_out_kl_reference(joint_logits, loo_logits, temperature, detach_joint, direction, objective)
    reverse, complementary = direction == "loo_to_joint", objective == "complementary"
    return _LeaveOneOutKL.apply(joint_logits, loo_logits, temperature, detach_joint, reverse, complementary, impl)


def why_unfit(joint_logits: Tensor) -> str:
    """Why there is no kernel for these logits; empty where there is one."""
    if joint_logits.dtype == torch.float64:
        return "joint_logits must not be float64"
    if joint_logits.shape[1] > MAX_CLASSES:
        return f"joint_logits must have at most {MAX_CLASSES} classes, got {joint_logits.shape[1]}"
    return ""


def why_too_large(**tensors: Tensor) -> str:
    """Why these are more than the kernel's single program can walk over; empty where they are not."""
    for name, tensor in tensors.items():
        if tensor.numel() >= MAX_ELEMENTS:
            return f"{name} must have fewer than 2^31 elements, got {list(tensor.shape)}"
    return ""


def check_logits(joint: Tensor, loo: Tensor, direction: str, objective: str) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    check_floating(joint_logits=joint, loo_logits=loo)
    if joint.ndim != 2 or min(joint.shape) < 1:
        raise ValueError(f"joint_logits must be [B, K] with neither 0, got {list(joint.shape)}")
    if loo.ndim != 3 or loo.shape[0] != joint.shape[0] or loo.shape[2] != joint.shape[1]:
        B, K = joint.shape
        raise ValueError(f"loo_logits must be [B, V, K] = [{B}, V, {K}] to fit joint_logits, got {list(loo.shape)}")
    if loo.dtype != joint.dtype:
        raise TypeError(f"loo_logits must have joint_logits' dtype, {joint.dtype}, got {loo.dtype}")
    if loo.device != joint.device:
        raise ValueError(f"loo_logits must have joint_logits' device, {joint.device}, got {loo.device}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
