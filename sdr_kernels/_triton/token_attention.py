"""Attention of few tokens: a program has some queries of one clip's head and walks over the keys, a tile at a time."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import FRAMES, PRECISIONS, AuditCase, randn
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels.token_attention import token_attention_reference


@triton.jit
def load_head(qkv_ptr, part, head, rows, row_mask, d, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head's queries (part 0), keys (1) or values (2) of these rows, [M, BLOCK_D]; 0 outside."""
    offsets = rows[:, None] * (3 * HEADS * HEAD_DIM) + ((part * HEADS + head) * HEAD_DIM + d)[None, :]
    return tl.load(qkv_ptr + offsets, mask=row_mask[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["N"])
def _token_attention_fwd_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    out_ptr,  # [B, N, HEADS, HEAD_DIM]
    N, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    clip = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    queries = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    q = load_head(qkv_ptr, 0, head, clip * N + queries, queries < N, d, HEADS, HEAD_DIM)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_head(qkv_ptr, 1, head, clip * N + tokens, tokens < N, d, HEADS, HEAD_DIM)
        v = load_head(qkv_ptr, 2, head, clip * N + tokens, tokens < N, d, HEADS, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((tokens < N)[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1), propagate_nan=tl.PropagateNan.ALL)
        # where all scores so far are -inf, their difference to the largest would be NaN and not 0's logarithm
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = highest
    offsets = (clip * N + queries)[:, None] * (HEADS * HEAD_DIM) + (head * HEAD_DIM + d)[None, :]
    mask = (queries < N)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + offsets, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def token_attention_fwd(qkv: Tensor, num_heads: int) -> Tensor:
    B, N, width = qkv.shape
    head_dim = width // (3 * num_heads)
    out = qkv.new_empty((B, N, width // 3))
    if B == 0:
        return out
    block_d = width_class(head_dim)
    tile = choose_tile(f"token_attention {precision_class(qkv.dtype)} head{block_d}", B * N, qkv.device)
    grid = (B * num_heads * triton.cdiv(N, tile["BLOCK_M"]),)
    with torch.cuda.device_of(qkv):
        _token_attention_fwd_kernel[grid](
            qkv.contiguous(), out, N, head_dim**-0.5, HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, **tile
        )
    return out


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Heads of every width that there is a tile for: `paper` has 12 of 64."""

    def inputs(heads, head_dim, B, device):
        width = 3 * heads * head_dim
        return randn(B, FRAMES // 2 + 1, width, device=device, dtype=PRECISIONS[precision]), heads

    for heads, head_dim in ((4, 16), (12, 32), (12, 64), (12, 128)):
        shape = partial(inputs, heads, head_dim)
        yield AuditCase(f"{heads} heads of {head_dim}", token_attention_fwd, token_attention_reference, shape)
