"""Cross-uniformity, a regulariser: samples of one modality stay away from other pairs' samples of the other.

Fahim et al. 2024, arXiv:2405.18570 (formula as in the official code, abrar-fahim/contrastive-gap: sharpness 2, weight 1):

    loss = log mean_{i≠j} e^{−sharpness ‖x_i − y_j‖²}

One logarithm over all B(B−1) combinations. Beside CLIP it closes the gap between the modalities' clouds together with alignment and
uniformity: `{name: clip, add: [alignment, uniformity, cross_uniformity]}` is the paper's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from clipscale.objectives import MAIN, Block, Objective, Row, Side, Sum, Terms, View
from clipscale.objectives._distances import squares
from clipscale.objectives._potentials import log_mean, potentials


class CrossUniformity(Objective):
    """Logarithm of the mean potential between the modalities."""

    takes_extras: ClassVar[bool] = True

    sharpness: float = Field(default=2.0, gt=0.0, le=20.0)
    """How fast the potential falls with the squared distance; the papers' 2. Above 20 it would be less than the smallest float32."""

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        return squares(views)

    def terms(self, block: Block) -> Terms:
        if block.extra is not None:
            return {}
        return {"potentials": Sum(potentials(block, MAIN, self.sharpness), block.left_out(), "x")}

    def row_sums(self, rows: Mapping[Side, Row]) -> dict[str, Tensor]:
        return {"potentials": rows["x"]["potentials"].sum()}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        return 0 * rows["x"]["potentials"]  # all of it is the batch's

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        return log_mean(statistics["potentials"], count)
