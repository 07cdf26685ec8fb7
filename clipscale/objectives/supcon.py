"""SupCon across modalities: several positives a sample, each as probable as the others.

Khosla et al. 2020, arXiv:2004.11362, equation 2 (L_out), between two modalities: with A_i the samples of the other side that belong to
i (same caption, same transcript or same label; its own partner among them), n_i their number and R_i = log Σ_j e^{logit_ij} over all,

    loss_i = −1/n_i Σ_{p ∈ A_i} (logit_ip − R_i),      both directions averaged

With `mean: false` the sum is not divided by n_i: the multi-positive softmax of Gupta et al. 2023, arXiv:2310.10636. The own pair is left
out of the sweep, R_i − logit_ii = softplus(u_i − logit_ii), so that samples with one positive keep their digits when fitted; with one
positive each this is CLIP.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Need, Objective, Row, Sum, Terms, softplus
from clipscale.objectives._positives import Positives, positives


class Supcon(Objective):
    """Softmax cross-entropy against all positives of a sample."""

    takes_extras: ClassVar[bool] = True

    positives: Positives = "same_text"
    """What makes samples positives: equal captions, or an equal int64 number `label` that the caller gives with every pair."""
    mean: bool = True
    """Divide by the number of positives, as SupCon does; false: do not, as the multi-positive softmax."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"} if self.positives == "same_text" else ())

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label",) if self.positives == "label" else ()

    def terms(self, block: Block) -> Terms:
        terms: dict[str, LogSumExp | Sum] = {"others": LogSumExp(block.logits, block.left_out())}
        mates = positives(block, self.positives)
        if mates is not None:  # positives other than the own pair
            without = ~mates if block.positive is None else ~mates | block.positive
            terms |= {"mates": Sum(block.logits, without), "count": Sum(torch.ones_like(block.logits), without)}
        return terms

    def row_loss(self, row: Row) -> Tensor:
        own = softplus(row["others"] - row.positive)
        count = row["count"] + 1
        total = count * own + row["count"] * row.positive - row["mates"]  # Σ_p (R − logit_p), with R = own + positive
        return total / count / 2 if self.mean else total / 2
