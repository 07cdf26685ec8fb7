"""What a method of computing the loss hands back, and how rows end: losses, their gradients, and the tally for the metrics.

Legend: b rows of a side that this rank owns, B pairs in the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.tiled import HARDEST, Layout
from clipscale.objectives import Objective, Pull, Row, Side

SIDES: tuple[Side, Side] = ("x", "y")


class Gradients(NamedTuple):
    """This rank's part: added over ranks, the gradient of the global mean loss."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor


class Result(NamedTuple):
    """Loss and metrics, the same on every rank, and this rank's gradients when any rank wants them."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: Gradients | None


class Finished(NamedTuple):
    """The rows that this rank owns, of both sides."""

    loss: Tensor
    """Their share of the global mean loss, float64."""
    pulls: dict[Side, dict[str, Pull]]
    """By side and term: [b]."""
    positive: Tensor
    """d loss / d logit of each pair: [b]."""


def finish(objective: Objective, layout: Layout, partials: Mapping[Side, Tensor], positive: Tensor, *, count: int) -> Finished:
    """Losses of the finished rows, and by autograd on these few numbers what each term and each pair's logit is worth."""
    pair = positive.detach().requires_grad_()
    totals = {side: _totals(layout, side, partials[side]) for side in SIDES}
    with torch.enable_grad():
        rows = [objective.row_loss(Row(side, pair, count, totals[side])) for side in SIDES]
        loss = sum_rows(rows, count=count)
    leaves = [pair, *(total for side in SIDES for total in totals[side].values())]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = iter(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True))
    positive_gradient = next(gradients)
    pulls: dict[Side, dict[str, Pull]] = {}
    for side in SIDES:
        partial = layout.split(side, partials[side])
        pulls[side] = {}
        for name, total in totals[side].items():
            share = layout.terms[side][name].share(partial[name], next(gradients))
            pulls[side][name] = Pull(total.detach(), share)
    return Finished(loss.detach(), pulls, positive_gradient)


def _totals(layout: Layout, side: Side, partial: Tensor) -> dict[str, Tensor]:
    """The objective's finished terms, as leaves of a graph."""
    split = layout.split(side, partial)
    return {name: term.total(split[name]).requires_grad_() for name, term in layout.terms[side].items() if name != HARDEST}


def sum_rows(losses: list[Tensor], *, count: int) -> Tensor:
    """Rows' losses to their share of the global mean, added in float64."""
    return torch.stack([loss.sum(dtype=torch.float64) for loss in losses]).sum() / count


@dataclass(frozen=True)
class Tally:
    """Counts and sums over a rank's rows; those of all ranks added up make the metrics."""

    numbers: Tensor
    """float64 [5]: Σ cosine of pairs, hits x→y, hits y→x, Σ cosine of the hardest negatives, rows that have one."""

    @classmethod
    def of(cls, cosine: Tensor, hardest: Mapping[Side, Tensor]) -> Tally:
        """Tally b pairs, from their cosines and their hardest negatives' on either side."""
        both = torch.cat([hardest[side] for side in SIDES])
        both = both[both > -torch.inf]
        hits = [(cosine > hardest[side]).sum() for side in SIDES]
        parts = [cosine.sum(dtype=torch.float64), *hits, both.sum(dtype=torch.float64), torch.tensor(len(both))]
        return cls(torch.stack([part.to(cosine.device, torch.float64) for part in parts]))

    def metrics(self, *, count: int) -> dict[str, Tensor]:
        """Metrics over the global batch of B pairs, from the tally of all ranks.

        A pair scores in top-1 when its cosine is larger than that of every combination with another caption: a tie is a miss.
        `hardest_negative` is the mean over both sides' samples; −1 when no sample has a negative.
        """
        positive, x_hits, y_hits, hardest, rows = self.numbers
        mean_hardest = torch.where(rows > 0, hardest / rows.clamp(min=1), -1.0)
        named = {
            "x_to_y_top1": x_hits / count,
            "y_to_x_top1": y_hits / count,
            "mean_positive": positive / count,
            "hardest_negative": mean_hardest,
        }
        return {name: value.float() for name, value in named.items()}
