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
    return {side: Row(side, own.pairs, count, totals.get(side, {}), own.scale, statistics, own.numbers, own.bias) for side in SIDES}


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
    bias: Tensor
    """The same of the bias; 0 where there is none."""

    def plus(self, other: Finished) -> Finished:
        """The same loss, with another value's worth of everything but statistics added."""
        return Finished(
            self.loss,
            {side: _added(self.totals[side], other.totals[side]) for side in SIDES},
            {pair: worth + other.pairs[pair] for pair, worth in self.pairs.items()},
            _added(self.numbers, other.numbers),
            self.statistics,
            self.scale + other.scale,
            self.bias + other.bias,
        )


def _added(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + other[name] for name, tensor in one.items()}


class Watched:
    """Pairs, with everything a loss of theirs is computed from as leaves of a new graph: O(b) numbers."""

    def __init__(self, totals: Totals, own: Own, statistics: Mapping[str, Tensor]) -> None:
        self.totals: Totals = {side: _leaves(totals[side]) for side in SIDES}
        self.pairs = _leaves(own.pairs)
        self.floating = _leaves({name: number for name, number in own.numbers.items() if number.is_floating_point()})
        self.statistics = _leaves(statistics)
        self.factors = _leaves({"scale": own.scale} if own.bias is None else {"scale": own.scale, "bias": own.bias})
        numbers = {**own.numbers, **self.floating}
        self.own = Own(own.views, self.pairs, self.factors["scale"], numbers, self.factors.get("bias"))

    def rows(self, count: int) -> dict[Side, Row]:
        """The pairs from both sides, of a global batch of `count`."""
        return rows_of(self.totals, own=self.own, count=count, statistics=self.statistics)

    def worth(self, value: Tensor) -> Finished:
        """d value / d everything."""
        groups = [self.totals["x"], self.totals["y"], self.pairs, self.floating, self.statistics, self.factors]
        flat = [leaf for group in groups for leaf in group.values()]
        found = torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else [None] * len(flat)
        gradients = iter(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(flat, found, strict=True))
        x, y, pairs, numbers, statistics, factors = ({name: next(gradients) for name in group} for group in groups)
        bias = factors.get("bias", torch.zeros_like(factors["scale"]))
        return Finished(value.detach(), {"x": x, "y": y}, pairs, numbers, statistics, factors["scale"], bias)


def finish(objective: Objective, totals: Totals, own: Own, statistics: Mapping[str, Tensor], *, count: int) -> Finished:
    """Losses of the pairs, and by autograd on these few numbers what each term and each pair's logit is worth."""
    watched = Watched(totals, own, statistics)
    with torch.enable_grad():
        loss = objective.pair_loss(watched.rows(count)).sum(dtype=torch.float64) / count
    return watched.worth(loss)


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
