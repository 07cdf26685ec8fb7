"""RGCL-g: a robust global contrastive loss whose temperature is learned against a price.

FastCLIP-v3, Wei et al. 2024, arXiv:2407.01445 (formula as in the official code, Optimization-AI/fast_clip), after iSogCLR, Qiu et al. 2023,
arXiv:2305.11965. With τ = 1/s and g_i the mean over the B − 1 negatives of e^{(cosine_ij − cosine_ii) / τ},

    loss = 1/B Σ_i τ [ log(ε + g_i of the row) + rho ]  +  the same of the columns

These are the exact means over the global batch (their γ = 1): the papers' moving averages of g_i over the steps, which stand in for a
larger batch, are not kept. A pair without any negative pays the price of the temperature alone.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Row, Term
from clipscale.objectives._views import log_add


class Rgcl(Objective):
    """Temperature times the logarithm of how much negatives outweigh the pair on average."""

    rho: float = Field(default=8.0, ge=0.0)
    """Price of a high temperature; the papers' 6 to 8."""
    epsilon: float = Field(default=1e-14, gt=0.0)
    """What the mean is held above, by addition; the official 1e-14."""

    def terms(self, block: Block) -> dict[str, Term]:
        return {"negatives": LogSumExp(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        mean = row["negatives"] - row.positive - math.log(max(1, row.count - 1))
        held = log_add(mean, mean.new_full(mean.shape, math.log(self.epsilon)))
        return (held.masked_fill(row["negatives"] == -math.inf, 0) + self.rho) / row.scale
