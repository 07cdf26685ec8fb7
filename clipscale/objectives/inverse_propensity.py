"""Inverse propensity: a negative counts the less, the oftener its caption occurs.

Inverse-propensity weights are DebCSE's idea, Miao et al. 2023, arXiv:2309.07396, for sampling; its propensity is UNVERIFIED, so this one
is ours: of a sample whose caption n_j pairs of the global batch have, n_j^power. With weights w_j = n_j^{−power},

    loss_i = −log [ e^{logit_ii} / (e^{logit_ii} + Σ_{j≠i} w_j e^{logit_ij}) ],      both directions averaged

With power 1 every caption counts once, however many pairs have it. With power 0, or where all captions differ, it is CLIP. Captions are
counted in a first sweep.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Need, Objective, Row, SameText, Sum, Terms, softplus


class InversePropensity(Objective):
    """Softmax cross-entropy whose negatives are weighted by how rare their captions are."""

    power: float = Field(default=1.0, ge=0.0)
    """Of the propensity; 0: no weights."""
    same_text: SameText = "negative"
    """`ignored`: combinations whose captions are equal, other than the pairs themselves, are no candidates."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"})

    def terms(self, block: Block) -> Terms:
        assert block.same_text is not None, "the engine gives what `needs` names"
        return {"equal captions": Sum(block.same_text.to(block.logits.dtype))}

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        return (self._weighted_terms,)

    def _weighted_terms(self, block: Block) -> Terms:
        rows, columns = block.reduced["equal captions"]  # a row's negatives are columns, and the other way round
        out = block.left_out(self.same_text)
        return {
            "negatives": [
                LogSumExp(block.logits - self.power * columns.log(), out, "x"),
                LogSumExp(block.logits - self.power * rows.log(), out, "y"),
            ]
        }

    def row_loss(self, row: Row) -> Tensor:
        return softplus(row["negatives"] - row.positive) / 2
