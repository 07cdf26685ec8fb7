"""Uniformity, a regulariser: the samples of a modality spread out over the sphere.

Wang & Isola 2020, arXiv:2005.10242; as an addition to CLIP, Fahim et al. 2024, arXiv:2405.18570 (formula as in the official code,
abrar-fahim/contrastive-gap: sharpness 2, the mean of both modalities, weight 1):

    loss = 1/2 [ u(x) + u(y) ],      u(x) = log mean_{i≠j} e^{−sharpness ‖x_i − x_j‖²}

One logarithm over all B(B−1) combinations. A single pair has no other sample to keep away from, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, Objective, Product, Row, Side, Sum, Terms, View
from clipscale.objectives._distances import squares
from clipscale.objectives._potentials import log_mean, potentials


class Uniformity(Objective):
    """Logarithm of the mean potential between a modality's samples."""

    takes_extras: ClassVar[bool] = True

    sharpness: float = Field(default=2.0, gt=0.0, le=20.0)
    """How fast the potential falls with the squared distance; the papers' 2. Above 20 it would be less than the smallest float32."""

    @property
    def products(self) -> tuple[Product, ...]:
        return (("x", "x"), ("y", "y"))

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        return squares(views)

    def terms(self, block: Block) -> Terms:
        if block.extra is not None:
            return {}
        return {view: Sum(potentials(block, (view, view), self.sharpness), block.left_out(), "x") for view in ("x", "y")}

    def row_sums(self, rows: Mapping[Side, Row]) -> dict[str, Tensor]:
        return {view: rows["x"][view].sum() for view in ("x", "y")}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        return 0 * rows["x"]["x"]  # all of it is the batch's

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        return (log_mean(statistics["x"], count) + log_mean(statistics["y"], count)) / 2
