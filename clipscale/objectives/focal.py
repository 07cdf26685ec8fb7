"""Focal weights: pairs that are told apart already count less.

KaLM-Embedding-V2, Zhao et al. 2025, arXiv:2506.20923 (formula from notes on the paper; whether its weight is detached is UNVERIFIED).
With the probability P_i that row i gives its own pair,

    loss_i = −(1 − P_i)^gamma log P_i,      both directions averaged

1 − P_i is computed as σ(u − p), which keeps its digits for fitted pairs. With gamma 0 it is CLIP.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from clipscale.objectives import Block, LogSumExp, Objective, Row, Term, softplus


class Focal(Objective):
    """Softmax cross-entropy, each row weighted by how far it is from fitted."""

    takes_extras: ClassVar[bool] = True

    gamma: float = Field(default=0.5, ge=0.0)
    """Power of the weight; the paper's 0.5."""
    through_weight: bool = True
    """Whether gradients flow through the weights too; false: they are constants."""

    def terms(self, block: Block) -> dict[str, Term]:
        return {"negatives": LogSumExp(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        lead = row["negatives"] - row.positive
        weight = (self.gamma * functional.logsigmoid(lead)).exp()
        return (weight if self.through_weight else weight.detach()) * softplus(lead) / 2
