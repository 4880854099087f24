"""Temporal transformer (TT): tokens of a clip's time steps to one logit (FTCN section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdr.config import FTCNConfig


class Attention(nn.Module):
    """Multi-head self-attention; the heads' total width may differ from the tokens'."""

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] to [B, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, head_dim]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Pre-norm layer: x + Attn(LN x), then x + MLP(LN x)."""

    def __init__(self, config: FTCNConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.attn_norm = nn.LayerNorm(D)
        self.attn = Attention(D, config.num_heads, config.head_dim)
        self.mlp_norm = nn.LayerNorm(D)
        self.mlp = nn.Sequential(
            nn.Linear(D, config.mlp_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp_dim, D),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] to [B, N, D]."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TemporalTransformer(nn.Module):
    """CLS token and learned positions before the layers, LayerNorm and Linear on the CLS token after them."""

    def __init__(self, config: FTCNConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens + 1, config.embed_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, 1)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, N, D] to logits, [B].

        Raises:
            ValueError: N is not the number of time steps that the learned positions were made for.
        """
        expected = self.pos_embed.shape[1] - 1
        if tokens.shape[1] != expected:
            raise ValueError(f"tokens must have {expected} time steps, got {list(tokens.shape)}")
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # [B, N + 1, D]
        x = self.dropout(x + self.pos_embed)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0])).squeeze(-1)
