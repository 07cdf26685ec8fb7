"""Soft-CLIP: how similar a modality's own samples are becomes the target for both directions.

M3CoL, Kumar, Singhal et al. 2024, arXiv:2409.17777, second stage (formula as in the official code, RaghavSinghal10/M3CoL). With the target
modality y, T the softmax of its own cosines over temperature, P and Q the softmaxes of the logits' rows and columns,

    loss = −1/2B Σ_ij T_ij log P_ij  −  1/2B Σ_ij T_ij log Q_ji,      T_ij = softmax_j ⟨y_i, y_j⟩ / target_temperature

A row is computed as softplus(u − p) + Σ_{j≠i} T_ij (p − logit_ij). With a target temperature → 0 it is CLIP. Unlike cwcl it needs no locked
tower: the targets are made of the embeddings in training. T meets its own finished sum, so this takes a second sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from clipscale.objectives import MAIN, Block, LogSumExp, Objective, Product, Row, Side, Sum, Terms, softplus


class SoftClip(Objective):
    """Softmax cross-entropy against soft targets from one modality's own similarities."""

    targets: Literal["first", "second"] = "second"
    """Whose own similarities are the targets."""
    target_temperature: float = Field(default=0.125, gt=0.0)
    """What the target modality's cosines are divided by; the paper's 0.125."""
    through_targets: bool = True
    """Whether gradients flow through the targets too; false: they are constants."""

    @property
    def _target_view(self) -> Side:
        return "x" if self.targets == "first" else "y"

    @property
    def products(self) -> tuple[Product, ...]:
        return (MAIN, (self._target_view, self._target_view))

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits, block.left_out()), "targets": LogSumExp(self._target_logits(block))}

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        return (self._weighted_terms,)

    def _target_logits(self, block: Block) -> Tensor:
        logits = block.products[self._target_view, self._target_view] / block.scale / self.target_temperature
        return logits if self.through_targets else logits.detach()

    def _weighted_terms(self, block: Block) -> Terms:
        logits, out = self._target_logits(block), block.left_out()
        totals = block.reduced["targets"]
        weights = [(logits - (total if self.through_targets else total.detach())).exp() for total in totals]
        sides: tuple[Side, Side] = ("x", "y")
        return {
            "weight": [Sum(weight, out, side) for weight, side in zip(weights, sides, strict=True)],
            "weighted": [Sum(weight * block.logits, out, side) for weight, side in zip(weights, sides, strict=True)],
        }

    def row_loss(self, row: Row) -> Tensor:
        return (softplus(row["negatives"] - row.positive) + row["weight"] * row.positive - row["weighted"]) / 2
