"""SigLIP: every combination of the global batch is its own yes-or-no question.

Zhai et al. 2023, arXiv:2303.15343, equation 1: −1/B Σ_ij log σ(z_ij (scale · cosine_ij + bias)), z = 1 for pairs and −1 otherwise. The
paper sums over all B² combinations and divides by B; so do we, also when the batch is split over ranks.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from clipscale.objectives import Block, Need, Objective, Row, SoftplusSum, Term, softplus


class Siglip(Objective):
    """Sigmoid cross-entropy of every combination, with a learned bias."""

    init_bias: ClassVar[float | None] = -10.0
    takes_extras: ClassVar[bool] = True
    one_sweep: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"bias"})

    def terms(self, block: Block) -> dict[str, Term]:
        return {"negatives": SoftplusSum(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return (row["negatives"] + softplus(-row.positive)) / 2  # both sides see every combination: each counts half
