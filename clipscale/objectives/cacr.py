"""CACR: partners attract each other, and the closer a negative is the more it repels.

Zheng et al. 2021, arXiv:2105.03746 (formula and values as in the official code, JegZheng/CACR-SSL). With the cost c(a, b) = ‖a − b‖² and
π_ij ∝ e^{−sharpness c(x_i, y_j)} over the negatives j ≠ i,

    loss_i = attraction c(x_i, y_i) − repulsion Σ_{j≠i} π_ij c(x_i, y_j),      both directions averaged

Attraction's weights over several positives are 1 here, where a sample has one. The temperature has no part in it. A pair without any
negative is only attracted. π meets its own finished sum, so this takes a second sweep. With sharpness → 0 all negatives repel alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field
from torch import Tensor

from clipscale.objectives import MAIN, Block, LogSumExp, Objective, Row, Sum, Terms, View
from clipscale.objectives._distances import block_distances, pair_distances, squares


class Cacr(Objective):
    """Squared distance of partners less the weighted mean squared distance of negatives."""

    attraction: float = Field(default=1.0, gt=0.0)
    """Factor of the partners' distance; the paper's α."""
    repulsion: float = Field(default=1.0, gt=0.0)
    """Factor of the negatives' distance; the paper's β."""
    sharpness: float = Field(default=0.9, gt=0.0)
    """How much closer negatives repel more; the paper's t⁻: 0.9 on CIFAR-10, 2 on CIFAR-100 and STL-10."""
    through_weights: bool = True
    """Whether gradients flow through π too, as in the official small-scale code; false: they are constants, as in its ImageNet code."""

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        return squares(views)

    def terms(self, block: Block) -> Terms:
        return {"energy": LogSumExp(-self.sharpness * block_distances(block, MAIN), block.left_out())}

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        return (self._repulsion_terms,)

    def _repulsion_terms(self, block: Block) -> Terms:
        cost, out = block_distances(block, MAIN), block.left_out()
        rows, columns = block.reduced["energy"]
        return {"repulsion": [Sum(self._weight(cost, rows, out) * cost, out, "x"), Sum(self._weight(cost, columns, out) * cost, out, "y")]}

    def _weight(self, cost: Tensor, energy: Tensor, out: Tensor | None) -> Tensor:
        exponent = -self.sharpness * cost - energy
        weight = (exponent if out is None else exponent.masked_fill(out, 0)).exp()  # the energy of a sample without negatives is −∞
        return weight if self.through_weights else weight.detach()

    def row_loss(self, row: Row) -> Tensor:
        return (self.attraction * pair_distances(row) - self.repulsion * row["repulsion"]) / 2
