"""MV-DHEL: alignment over all views of an instance, uniformity within each view; no view meets another's negatives.

Koromilas et al. 2025, arXiv:2507.06979; formulas as in the authors' README and code (pakoromilas/Multi-View-CL). With views l of
instance i and logits s⟨U_il, U_jm⟩,

    loss_i = −log [ Σ_{l≠l'} e^{⟨U_il, U_il'⟩ s} / Π_l Σ_j e^{⟨U_il, U_jl⟩ s} ]          (form: paper; ordered pairs, j = i included)
    loss_i = −log Σ_{l<l'} e^{⟨U_il, U_il'⟩ s} + Σ_l log Σ_{j≠i} e^{⟨U_il, U_jl⟩ s}          (form: code)

One block of logits a view, none between views: top-1 metrics do not exist. The paper's denominators hold each sample's product with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Product, Row, Side, Terms, View
from clipscale.objectives._views import own_logits, view_names, within


class MvDhel(Objective):
    """Views of an instance close together, each view spread out."""

    num_views: int = Field(default=2, ge=2)
    """Views or modalities of a pair: x, y, z, view_4 and so on."""
    form: Literal["paper", "code"] = "paper"
    """`paper`: a sample is among its own energies; `code`: it is not, as in the official code."""

    @property
    def views(self) -> tuple[View, ...]:
        return view_names(self.num_views)

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(within(self.views))

    def terms(self, block: Block) -> Terms:
        out = block.left_out() if self.form == "code" else None
        return {view: LogSumExp(block.products[view, view], out, "x") for view in self.views}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        row = rows["x"]
        energies = [row[view] for view in self.views]
        return sum(energies[1:], energies[0]) - own_logits(row, ordered=self.form == "paper")
