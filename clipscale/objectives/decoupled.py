"""Decoupled softmax: several positives a sample, none of which competes with another.

DEXML, Gupta et al. 2023, arXiv:2310.10636, section 4 (formula as in the official code, nilesh2797/DEXML): with A_i the samples of the
other side that belong to i, n_i their number and N_i = log Σ_{j ∉ A_i} e^{logit_ij} over the negatives alone,

    loss_i = 1/n_i Σ_{p ∈ A_i} softplus(N_i − logit_ip),      both directions averaged

Positives meet the finished N_i, so this takes a second sweep. With one positive each it is CLIP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Need, Objective, Row, Sum, Terms, softplus
from clipscale.objectives._positives import Positives, positives


class Decoupled(Objective):
    """Each positive against the negatives alone."""

    takes_extras: ClassVar[bool] = True

    positives: Positives = "same_text"
    """What makes samples positives: equal captions, or an equal int64 number `label` that the caller gives with every pair."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"} if self.positives == "same_text" else ())

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label",) if self.positives == "label" else ()

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits, positives(block, self.positives))}

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        return (self._positive_terms,)

    def _positive_terms(self, block: Block) -> Terms:
        mates = positives(block, self.positives)
        if mates is None:
            return {}
        without = ~mates if block.positive is None else ~mates | block.positive
        rows, columns = block.reduced["negatives"]
        return {
            "mates": [
                Sum(softplus((rows - block.logits).masked_fill(without, 0)), without, "x"),
                Sum(softplus((columns - block.logits).masked_fill(without, 0)), without, "y"),
            ],
            "count": Sum(torch.ones_like(block.logits), without),
        }

    def row_loss(self, row: Row) -> Tensor:
        own = softplus(row["negatives"] - row.positive)
        return (own + row["mates"]) / (row["count"] + 1) / 2
