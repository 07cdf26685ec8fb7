"""What a method of computing the loss hands back, and how pairs end: their losses, these losses' gradients, and the tally for the metrics.

Legend: b pairs that this rank owns, B in the global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.layout import SIDES
from clipscale.objectives import Objective, Own, Product, Row, Side

METRICS = 4
"""Of an objective that compares x with y."""
TALLY = 6
"""Numbers that ranks add up for loss and metrics."""
Totals = dict[Side, dict[str, Tensor]]


class Gradients(NamedTuple):
    """This rank's part: added over ranks, the gradient of the global mean loss."""

    leaves: dict[str, Tensor]
    """By name, of those that any rank wants."""
    scale: Tensor
    bias: Tensor


class Result(NamedTuple):
    """Loss and metrics, the same on every rank, and this rank's gradients when any rank wants them."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: Gradients | None


def pairs_of_views(objective: Objective) -> list[Product]:
    """Views of a pair that meet each other: x with y, and so on for further views."""
    return list(itertools.combinations(objective.views, 2))


def rows_of(totals: Totals, *, own: Own, count: int, statistics: Mapping[str, Tensor]) -> dict[Side, Row]:
    """Both sides' rows of the pairs."""
    return {side: Row(side, own.pairs, count, totals.get(side, {}), own.scale, statistics, own.numbers) for side in SIDES}


class Finished(NamedTuple):
    """What this rank's pairs lose, and what everything they were computed from is worth."""

    loss: Tensor
    """Their share of the global mean loss, float64."""
    totals: Totals
    """d loss / d term: [b]."""
    pairs: dict[Product, Tensor]
    """d loss / d logit of each pair with itself, by views: [b]."""
    numbers: dict[str, Tensor]
    """d loss / d number: [b]."""
    statistics: dict[str, Tensor]
    """d this rank's share / d statistic."""
    scale: Tensor
    """d loss / d scale where the objective uses it itself, besides the logits that it is in."""


def finish(objective: Objective, totals: Totals, own: Own, statistics: Mapping[str, Tensor], *, count: int) -> Finished:
    """Losses of the pairs, and by autograd on these few numbers what each term and each pair's logit is worth."""
    groups: list[Mapping[str, Tensor] | Mapping[Product, Tensor]] = [
        own.pairs,
        {name: number for name, number in own.numbers.items() if number.is_floating_point()},
        statistics,
        {"scale": own.scale},
        *(totals[side] for side in SIDES),
    ]
    leaves = [_leaves(group) for group in groups]
    numbers = {**own.numbers, **leaves[1]}
    watched = Own(own.views, leaves[0], leaves[3]["scale"], numbers)
    with torch.enable_grad():
        rows = rows_of({"x": leaves[4], "y": leaves[5]}, own=watched, count=count, statistics=leaves[2])
        loss = objective.pair_loss(rows).sum(dtype=torch.float64) / count
    flat = [leaf for group in leaves for leaf in group.values()]
    found = torch.autograd.grad(loss, flat, allow_unused=True) if loss.requires_grad else [None] * len(flat)
    gradients = iter(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(flat, found, strict=True))
    pairs, floating, summed, scale, x_totals, y_totals = ({name: next(gradients) for name in group} for group in leaves)
    return Finished(loss.detach(), {"x": x_totals, "y": y_totals}, pairs, floating, summed, scale["scale"])


def _leaves(group: Mapping) -> dict:  # type: ignore[type-arg]
    return {name: tensor.detach().requires_grad_() for name, tensor in group.items()}


def share_of_batch_loss(objective: Objective, statistics: Mapping[str, Tensor], *, count: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The part of the loss that depends on statistics alone, and its gradients by statistic; the same on every rank."""
    leaves = _leaves(statistics)
    with torch.enable_grad():
        loss = objective.batch_loss(leaves, count=count) if leaves else None
    if loss is None or not loss.requires_grad:
        return (None if loss is None else loss.detach()), {}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _chunk(rows: Tensor) -> int:
    """Rows to convert at a time: a small copy on a CPU, few launches on a GPU."""
    return 1024 if rows.device.type == "cpu" else 8192


def row_dots(one: Tensor, other: Tensor) -> Tensor:
    """⟨row, row⟩ in the other's dtype, without a copy of all rows: [n, D], [n, D] -> [n]."""
    chunk = _chunk(one)
    parts = [(a.to(b.dtype) * b).sum(1) for a, b in zip(torch.split(one, chunk), torch.split(other, chunk), strict=True)]
    return torch.cat(parts) if parts else other.new_zeros(0)


def add_scaled_rows(into: Tensor, factor: Tensor, rows: Tensor) -> None:
    """into += factor · rows, without a copy of all rows: [n, D], [n], [n, D]."""
    chunk = _chunk(rows)
    for target, weight, part in zip(*(torch.split(tensor, chunk) for tensor in (into, factor, rows)), strict=True):
        target.addcmul_(weight.unsqueeze(1), part.to(into.dtype))


@dataclass(frozen=True)
class Tally:
    """Counts and sums over a rank's pairs; those of all ranks added up make the metrics."""

    numbers: Tensor
    """float64 [5]: Σ cosine of pairs, hits x→y, hits y→x, Σ cosine of the hardest negatives, rows that have one."""

    @classmethod
    def of(cls, cosine: Tensor, hardest: Mapping[Side, Tensor]) -> Tally:
        """Tally b pairs, from their cosines and their hardest negatives' on either side; without those, from the cosines alone."""
        sides = [hardest.get(side, cosine.new_zeros(0)) for side in SIDES]
        both = torch.cat(sides)
        both = both[both > -torch.inf]
        hits = [(cosine > side).sum() if len(side) else cosine.new_zeros(()) for side in sides]
        parts = [cosine.sum(dtype=torch.float64), *hits, both.sum(dtype=torch.float64), torch.tensor(len(both))]
        return cls(torch.stack([part.to(cosine.device, torch.float64) for part in parts]))

    def metrics(self, *, count: int, with_hardest: bool) -> dict[str, Tensor]:
        """Metrics over the global batch of B pairs, from the tally of all ranks.

        A pair scores in top-1 when its cosine is larger than that of every combination with another caption: a tie is a miss.
        `hardest_negative` is the mean over both sides' samples; −1 when no sample has a negative. An objective that never compares x
        with y has no metric but `mean_positive`.
        """
        positive, x_hits, y_hits, hardest, rows = self.numbers
        named = {"mean_positive": positive / count}
        if with_hardest:
            named |= {
                "x_to_y_top1": x_hits / count,
                "y_to_x_top1": y_hits / count,
                "hardest_negative": torch.where(rows > 0, hardest / rows.clamp(min=1), -1.0),
            }
        return {name: value.float() for name, value in named.items()}


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Parts added one after the other: the same bits wherever it is done."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
