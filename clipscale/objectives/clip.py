"""CLIP: pick the right partner among all of the global batch, in both directions.

Radford et al. 2021, arXiv:2103.00020, figure 3: the mean of the cross-entropies over rows and over columns of the scaled cosines.
Label smoothing is ALIGN's, Jia et al. 2021, arXiv:2102.05918, section 5, in CLIP's convention (mean of the directions, not sum).
Of a sample with pair logit p and u = log Σ e^logit over the negatives, the cross-entropy is softplus(u − p): the same number as
logsumexp(all) − p, but exact to the last digits for fitted pairs too, where the usual form loses all of them.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, Need, Objective, Row, SameText, Term
from clipscale.objectives._softmax import candidate_terms, cross_entropy


class Clip(Objective):
    """Softmax cross-entropy over the global batch, both directions averaged."""

    takes_extras: ClassVar[bool] = True

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target spread evenly over all candidates, 0 to 1; ALIGN uses 0.1."""
    same_text: SameText = "negative"
    """`ignored`: combinations whose captions are equal, other than the pairs themselves, are no candidates."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"} if self.same_text == "ignored" else ())

    def terms(self, block: Block) -> dict[str, Term]:
        return candidate_terms(block.logits, block.left_out(self.same_text), label_smoothing=self.label_smoothing)

    def row_loss(self, row: Row) -> Tensor:
        return cross_entropy(row, row.positive, label_smoothing=self.label_smoothing) / 2
