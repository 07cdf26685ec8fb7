"""DCL: contrast decoupled from the positive; a pair's own logit is no part of what it is compared with.

Yeh et al. 2021, arXiv:2110.06848, equation 6. Across modalities, per row with pair logit p and u = log Σ e^logit over the negatives:
u − p, both directions averaged. It differs from CLIP's softplus(u − p) by the coupling alone, whose gradient vanishes for easy pairs, and
may be negative. The paper's own form has two views of one modality and takes negatives from both:

    loss_i = −p_i + log ( Σ_{j≠i} e^{⟨x_i, y_j⟩ s} + Σ_{j≠i} e^{⟨x_i, x_j⟩ s} )          (negatives: both)

A pair without any negative loses nothing. The official code sums the two directions; we take their mean, as CLIP does.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from clipscale.objectives import Block, Objective, Product, Row, Terms
from clipscale.objectives._decoupled_negatives import Negatives, negatives, products, where_any_negative


class Dcl(Objective):
    """Log-sum-exp of the negatives minus the pair's logit, both directions averaged."""

    takes_extras: ClassVar[bool] = True

    negatives: Negatives = "other"
    """`other`: the other modality's samples; `both`: also the own modality's, the paper's two-view form."""

    @property
    def products(self) -> tuple[Product, ...]:
        return products(self.negatives)

    def terms(self, block: Block) -> Terms:
        return {"negatives": negatives(block)}

    def row_loss(self, row: Row) -> Tensor:
        return where_any_negative(row, row["negatives"] - row.positive) / 2
