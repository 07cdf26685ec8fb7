"""Multi-label: every combination is its own yes-or-no question, and several may be a yes.

Binary cross-entropy over all labels, the baseline of DEXML, Gupta et al. 2023, arXiv:2310.10636 (formula as in the official code,
nilesh2797/DEXML): with z_ij = 1 where row and column belong together, else −1,

    loss = 1/B² Σ_ij softplus(−z_ij logit_ij)

It has no bias, unlike siglip, and is divided by all combinations, not by the rows.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from clipscale.objectives import Block, Need, Objective, Row, SoftplusSum, Terms, softplus
from clipscale.objectives._positives import Positives, positives


class MultiLabel(Objective):
    """Sigmoid cross-entropy of every combination, with several positives a sample."""

    one_sweep: ClassVar[bool] = True

    positives: Positives = "same_text"
    """What makes samples positives: equal captions, or an equal int64 number `label` that the caller gives with every pair."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"} if self.positives == "same_text" else ())

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label",) if self.positives == "label" else ()

    def terms(self, block: Block) -> Terms:
        belongs = positives(block, self.positives)
        assert belongs is not None, "it takes no extra samples, and captions are among its needs"
        mates_without = ~belongs if block.positive is None else ~belongs | block.positive
        return {"negatives": SoftplusSum(block.logits, belongs), "mates": SoftplusSum(-block.logits, mates_without)}

    def row_loss(self, row: Row) -> Tensor:
        return (row["negatives"] + row["mates"] + softplus(-row.positive)) / row.count / 2  # both sides see every combination
