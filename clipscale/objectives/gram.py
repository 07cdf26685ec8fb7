"""GRAM: modalities belong together when the volume that their embeddings span is small.

Cicchetti et al. 2024, arXiv:2412.11959 (formula as in the official code, ispamm/GRAM, whose anchor is the text and whose labels are
smoothed by 0.1). With y the anchor and the other modalities x, z of one and the same sample j,

    V_ij = sqrt |det Gram(y_i, x_j, z_j)|,      loss: CLIP of the logits −s V, both directions averaged

With two views V = √(1 − cosine²): an opposite is as close as an equal, and no logit is above 0. Where V is 0 its gradient is infinite, so a
small number is added to the determinant. The paper's matching head is not part of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, Objective, Product, Row, Term, View
from clipscale.objectives._distances import squares
from clipscale.objectives._softmax import candidate_terms, cross_entropy
from clipscale.objectives._views import view_names


class Gram(Objective):
    """Softmax cross-entropy of volumes."""

    num_views: Literal[2, 3] = 2
    """Modalities of a pair: x and y, or x, y and z."""
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the target spread evenly over all candidates, 0 to 1; the paper's 0.1."""
    epsilon: float = Field(default=1e-6, ge=0.0)
    """Added to the determinant before its root is taken; the official code adds nothing."""

    @property
    def views(self) -> tuple[View, ...]:
        return view_names(self.num_views)

    @property
    def products(self) -> tuple[Product, ...]:
        return (("x", "y"), ("z", "y"))[: self.num_views - 1]

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        angles = {"x with z": (views["x"] * views["z"]).sum(1)} if self.num_views == 3 else {}
        return {**squares(views), **angles}

    def terms(self, block: Block) -> dict[str, Term]:
        others = {name: numbers[0] for name, numbers in block.numbers.items()}
        anchor = block.numbers["square of y"][1]
        cosines = {view: block.products[view, "y"] / block.scale for view, _ in self.products}
        volumes = self._volumes(cosines, others, anchor)
        return candidate_terms(-block.scale * volumes, block.left_out(), label_smoothing=self.label_smoothing)

    def row_loss(self, row: Row) -> Tensor:
        cosines = {"x": row.pairs["x", "y"] / row.scale}
        if self.num_views == 3:
            cosines["z"] = row.pairs["y", "z"] / row.scale
        volumes = self._volumes(cosines, row.numbers, row.numbers["square of y"])
        return cross_entropy(row, -row.scale * volumes, label_smoothing=self.label_smoothing) / 2

    def _volumes(self, cosines: Mapping[View, Tensor], others: Mapping[str, Tensor], anchor: Tensor) -> Tensor:
        """Of the anchors, their cosines with the other modalities, and those modalities' own Gram matrices."""
        x, xx = cosines["x"], others["square of x"]
        determinant = anchor * xx - x.square()
        if self.num_views == 3:
            z, zz, xz = cosines["z"], others["square of z"], others["x with z"]
            determinant = anchor * (xx * zz - xz.square()) - x.square() * zz - z.square() * xx + 2 * x * z * xz
        return (determinant.abs() + self.epsilon).sqrt()  # rounding may leave it below 0
