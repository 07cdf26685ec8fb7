"""Self-attention with query, key and value packed into one matrix, as in torch's and open_clip's modules, cut over tensor ranks by heads.

b samples, n tokens, d width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clipscale.parallel.tensor_parallel import Region, RowLinear, cut, part


class PackedAttention(nn.Module):
    """Takes the place of a whole module with parameters `in_proj_weight`, `in_proj_bias` and `out_proj`, under the same names."""

    def __init__(self, whole: Any, region: Region) -> None:
        super().__init__()
        self.in_proj_weight = cut(whole.in_proj_weight, region.mesh, dim=0)
        self.in_proj_bias = None if whole.in_proj_bias is None else cut(whole.in_proj_bias, region.mesh, dim=0)
        self.out_proj = RowLinear(whole.out_proj, region)
        self.region = region
        self.heads = whole.num_heads // region.mesh.size()
        self.dropout = dropout_of(whole)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[b, n, d] -> [b, n, d]."""
        bias = None if self.in_proj_bias is None else part(self.in_proj_bias)
        packed = functional.linear(self.region.enter(x), part(self.in_proj_weight), bias)
        query, key, value = packed.view(*packed.shape[:-1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._own_mask(mask, query), dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _own_mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Of a mask [n, n], or one for each sample and head [b·heads, n, n], what this rank's heads need, to be added to logits."""
        if mask is None:
            return None
        if mask.dtype.is_floating_point:
            mask = mask.to(query.dtype)
        else:
            mask = query.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
        if mask.ndim == 2:
            return mask
        first = self.region.mesh.get_local_rank() * self.heads
        return mask.view(len(query), -1, *mask.shape[1:])[:, first : first + self.heads]


class TorchAttention(PackedAttention):
    """In the place of nn.MultiheadAttention (batch first), for self-attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool, attn_mask: Tensor | None) -> tuple[Tensor, None]:
        """[b, n, d] -> [b, n, d], and no weights."""
        assert query is key is value and not need_weights  # noqa: PT018
        return self.attend(query, attn_mask), None


class OpenClipAttention(PackedAttention):
    """In the place of open_clip's own Attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[b, n, d] -> [b, n, d]."""
        return self.attend(x, attn_mask)


def dropout_of(whole: Any) -> float:
    """The attention dropout of the module that is replaced."""
    return float(whole.dropout if isinstance(whole, nn.MultiheadAttention) else whole.attn_drop.p)
