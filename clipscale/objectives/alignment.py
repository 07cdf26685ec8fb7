"""Alignment, a regulariser: the partners of a pair lie close together.

Wang & Isola 2020, arXiv:2005.10242, with α = 2; as an addition to CLIP, Fahim et al. 2024, arXiv:2405.18570 (formula as in the official
code, abrar-fahim/contrastive-gap, which gives every part the weight 1):

    loss = 1/B Σ_i ‖x_i − y_i‖²

It compares no sample with another: alone, it draws all embeddings into one point.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clipscale.objectives import Block, Objective, Product, Row, Side, Terms, View
from clipscale.objectives._distances import pair_distances, squares


class Alignment(Objective):
    """Mean squared distance of the partners."""

    @property
    def products(self) -> tuple[Product, ...]:
        return ()

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        return squares(views)

    def terms(self, block: Block) -> Terms:  # noqa: ARG002 - it reduces nothing
        return {}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        return pair_distances(rows["x"])
