"""MV-InfoNCE: one term an instance over all of its views, instead of one for every pair of views.

Koromilas et al. 2025, arXiv:2507.06979; formula as in the authors' README (pakoromilas/Multi-View-CL). With views l of instance i and
logits s⟨U_il, U_jm⟩,

    loss_i = −log [ Σ_{l≠l'} e^{⟨U_il, U_il'⟩ s} / Σ_{l, m≠l, j} e^{⟨U_il, U_jm⟩ s} ]

The official code differs: its denominator also holds negatives of the same view, j ≠ i and m = l (`same_view_negatives`). Own logits are
left out of the sweep: loss_i = softplus(u − p), with p over the own logits and u over all others. With two views this is one softmax over
a row and a column together.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Product, Row, Side, Terms, View, softplus
from clipscale.objectives._views import across, log_add, own_logits, view_names, within


class MvInfonce(Objective):
    """All views of an instance against all views of the others."""

    num_views: int = Field(default=2, ge=2)
    """Views or modalities of a pair: x, y, z, view_4 and so on."""
    same_view_negatives: bool = False
    """Also other instances' samples of the same view are negatives, as in the official code; the paper has them not."""

    @property
    def views(self) -> tuple[View, ...]:
        return view_names(self.num_views)

    @property
    def products(self) -> tuple[Product, ...]:
        return (*across(self.views), *(within(self.views) if self.same_view_negatives else ()))

    def terms(self, block: Block) -> Terms:
        out = block.left_out()
        parts = [LogSumExp(block.products[product], out) for product in across(self.views)]
        if self.same_view_negatives:
            parts += [LogSumExp(block.products[product], out, "x") for product in within(self.views)]
        return {"negatives": parts}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        negatives = log_add(rows["x"]["negatives"], rows["y"]["negatives"])
        return softplus(negatives - own_logits(rows["x"], ordered=True))
