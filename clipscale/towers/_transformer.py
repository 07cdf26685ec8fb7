"""Our own transformer blocks and masks: what the small towers are made of.

b samples, n tokens, d width. Pre-norm blocks (Xiong et al. 2020, arXiv:2002.04745) with torch's fused attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU perceptron, each added to its input."""

    def __init__(self, width: int, *, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads)
        self.mlp_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[b, n, d] -> [b, n, d]; tokens where `valid` [b, n] is false are seen by no other token."""
        x = x + self.dropout(self.attention(self.attention_norm(x), valid))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention; separate projections, so that each can be split over tensor-parallel ranks."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[b, n, d] -> [b, n, d]."""
        mask = None if valid is None else valid[:, None, None, :]
        query, key, value = (self._split(projection(x)) for projection in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)  # as many heads as there are: a tensor rank has some


def valid_positions(length: Tensor, size: int) -> Tensor:
    """Lengths [b] to a mask [b, size], true before each length; an empty row keeps its first position, so that nothing is 0/0."""
    return torch.arange(size, device=length.device) < length.clamp(min=1).unsqueeze(1)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens: [b, n, d], [b, n] -> [b, d], summed in fp32 or better."""
    total = widened(x).masked_fill(~valid.unsqueeze(-1), 0.0).sum(dim=1)
    return (total / valid.sum(dim=1, keepdim=True)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """The same numbers in fp32, or in fp64 if they come so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(count: int, width: int, *, device: torch.device) -> Tensor:
    """Fixed positions [count, width], wavelengths from 2π to 10,000·2π (Vaswani et al. 2017, arXiv:1706.03762)."""
    rates = 10_000.0 ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(count, device=device, dtype=torch.float32).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
