"""DCLW: DCL whose positives are weighted, dissimilar pairs more.

Yeh et al. 2021, arXiv:2110.06848, section 3.3: −w_i p_i + u_i with the von Mises–Fisher weight

    w_i = 2 − e^{cosine_ii / sigma} / mean_k e^{cosine_kk / sigma}

whose mean over the global batch is exactly 1; no gradient flows through it. The official code forgets the mean (its w is about
2 − softmax); this is the paper's. With sigma → ∞ it is DCL.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from clipscale.objectives import MAIN, Block, Objective, Own, Product, Row, Terms
from clipscale.objectives._decoupled_negatives import Negatives, negatives, products, where_any_negative


class Dclw(Objective):
    """Log-sum-exp of the negatives minus the pair's weighted logit, both directions averaged."""

    takes_extras: ClassVar[bool] = True

    negatives: Negatives = "other"
    """`other`: the other modality's samples; `both`: also the own modality's, the paper's two-view form."""
    sigma: float = Field(default=0.5, gt=0.0)
    """Width of the weight over cosines; the paper's 0.5."""

    @property
    def products(self) -> tuple[Product, ...]:
        return products(self.negatives)

    def terms(self, block: Block) -> Terms:
        return {"negatives": negatives(block)}

    def statistics(self, own: Own) -> dict[str, Tensor]:
        return {"weights": self._exponential(own.pairs[MAIN], own.scale).sum()}

    def row_loss(self, row: Row) -> Tensor:
        weight = 2 - self._exponential(row.positive, row.scale) * row.count / row.statistics["weights"].detach()
        return where_any_negative(row, row["negatives"] - weight * row.positive) / 2

    def _exponential(self, positive: Tensor, scale: Tensor) -> Tensor:
        return (positive.detach() / scale.detach() / self.sigma).exp()
