"""Z-loss: how many standard deviations a pair's cosine lies above its row's mean.

de Brébisson & Vincent 2016, arXiv:1604.08859, for a row over the whole global batch (formula from memory, UNVERIFIED; a and b are tuned on
validation data there):

    z_i = (cosine_ii − mean_j cosine_ij) / std_j cosine_ij,      loss_i = 1/a softplus(a (b − z_i)),      both directions averaged

A row's shift and scale change nothing, so that the temperature gets no gradient. Not the auxiliary z-loss of language models.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, Objective, Row, Sum, Term, softplus


class ZLoss(Objective):
    """Softplus of a pair's standardised cosine."""

    a: float = Field(default=1.0, gt=0.0)
    """Sharpness of the softplus."""
    b: float = 0.0
    """Standard deviations at which a pair counts as told apart."""

    def terms(self, block: Block) -> dict[str, Term]:
        cosine = block.logits / block.scale
        return {"sum": Sum(cosine), "squares": Sum(cosine.square())}

    def row_loss(self, row: Row) -> Tensor:
        mean = row["sum"] / row.count
        variance = (row["squares"] / row.count - mean.square()).clamp(min=1e-12)  # a single pair has none
        z = (row.positive / row.scale - mean) / variance.sqrt()
        return softplus(self.a * (self.b - z)) / self.a / 2
