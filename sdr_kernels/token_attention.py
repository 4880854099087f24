"""Multi-head self-attention of a few tokens, from one linear layer's queries, keys and values."""

import torch
from torch import Tensor

from sdr_kernels._ops import check_floating, needs_gradient, register, select_impl

MAX_HEAD_DIM = 128  # a program's registers hold a head's whole width


def token_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The definition: scores and softmax in float32 or wider, rounded before they meet the values."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, head_dim]
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1).to(qkv.dtype) @ v).transpose(1, 2).flatten(2)


_fwd = register(
    "token_attention",
    "token_attention_fwd",
    "(Tensor qkv, int num_heads, str impl) -> Tensor",
    fake=lambda qkv, num_heads: qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3)),
)


def token_attention(qkv: Tensor, num_heads: int, *, impl: str = "auto") -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` of every head in one launch, the softmax in float32.

    The kernel is for inference, the reference is differentiable.

    Args:
        qkv: [B, N, 3 * num_heads * head_dim], queries, keys and values, each head after head, as one nn.Linear gives
            them; float32, float16 or bfloat16 (the reference takes float64 too).
        num_heads: heads, at least 1.
        impl: "auto" (Triton on CUDA where it fits and no gradient is recorded, else the reference), "reference" or
            "triton", which takes head_dim up to 128.

    Returns:
        [B, N, num_heads * head_dim] of qkv's dtype, head after head.

    Raises:
        ValueError: a rank or width is wrong, or N is 0.
        TypeError: the dtype is wrong.
        RuntimeError: the named implementation cannot run here or on this size, or has no gradient.
    """
    check_floating(qkv=qkv)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if qkv.ndim != 3 or qkv.shape[1] < 1 or qkv.shape[2] < 1 or qkv.shape[2] % (3 * num_heads):
        width = f"a multiple of {3 * num_heads}"
        raise ValueError(f"qkv must be [B, N, 3 * {num_heads} * head_dim], N >= 1 and {width}, got {list(qkv.shape)}")
    impl = select_impl(impl, qkv, unfit=why_unfit(qkv, num_heads))
    if impl == "reference":
        return token_attention_reference(qkv, num_heads)
    return _fwd(qkv, num_heads, impl)


def why_unfit(qkv: Tensor, num_heads: int) -> str:
    """Why there is no kernel for this input; empty where there is one."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    if qkv.dtype == torch.float64:
        return "qkv must not be float64"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    return needs_gradient(qkv)
