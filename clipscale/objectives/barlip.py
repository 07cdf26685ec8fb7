"""BarLIP, a regulariser: the same feature of both modalities agrees over the batch, and different features do not.

Fini et al. 2023, arXiv:2305.08675 (formula and values as in the official code, facebookresearch/clip-rocket), after Barlow Twins, Zbontar
et al. 2021, arXiv:2103.03230. With c = Xᵀ Y / B over the global batch,

    loss = strength [ Σ_k (1 − c_kk)²  +  off_diagonal Σ_{k≠l} c_kl² ]

Like the official code's, c is not standardised over the batch. The paper takes it from projectors of its own, 8192 wide; this takes the
embeddings. Ranks add up D² numbers; no sample is compared with another.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, Objective, Own, Product, Row, Side, Terms


class Barlip(Objective):
    """Cross-correlation of the modalities' features, drawn towards the identity."""

    strength: float = Field(default=0.025, gt=0.0)
    """Factor of all of it; the paper's 0.025."""
    off_diagonal: float = Field(default=5e-3, ge=0.0)
    """Factor of the correlations between different features; the paper's 5e-3."""

    @property
    def products(self) -> tuple[Product, ...]:
        return ()

    def terms(self, block: Block) -> Terms:  # noqa: ARG002 - it reduces nothing
        return {}

    def statistics(self, own: Own) -> dict[str, Tensor]:
        return {"correlation": own.views["x"].T @ own.views["y"]}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        return 0 * rows["x"].positive  # all of it is the batch's

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        correlation = statistics["correlation"] / count
        same = correlation.diagonal()
        others = correlation.square().sum() - same.square().sum()
        return self.strength * ((1 - same).square().sum() + self.off_diagonal * others)
