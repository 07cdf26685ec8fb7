"""Statistics: an objective's small sums over the global batch, before the sweeps and after them, and the way back through both.

Legend: b pairs that this rank owns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clipscale.contrast.result import Finished, Totals, Watched, rows_of
from clipscale.objectives import Objective, Own, Product

AddOverRanks = Callable[[Tensor], Tensor]
"""Numbers of this rank to their sum over all ranks, the same bits on each."""


class Statistics:
    """`Objective.statistics`: sums of what the pairs are."""

    totals: Mapping[str, Tensor]
    """Over the global batch, in the loss's dtype."""

    def __init__(self, objective: Objective, own: Own, *, add_over_ranks: AddOverRanks) -> None:
        self.own: dict[str, Tensor] = {}
        self.totals = {}
        self.add_over_ranks = add_over_ranks
        if type(objective).statistics is Objective.statistics:
            return
        views = {name: features.detach().to(own.scale.dtype).requires_grad_() for name, features in own.views.items()}
        pairs = {pair: logit.detach().requires_grad_() for pair, logit in own.pairs.items()}
        scale = own.scale.detach().requires_grad_()
        bias = None if own.bias is None else own.bias.detach().requires_grad_()
        self.inputs: dict[str | Product, Tensor] = {"scale": scale}
        self.inputs.update(views.items())
        self.inputs.update(pairs.items())
        if bias is not None:
            self.inputs["bias"] = bias
        with torch.enable_grad():
            self.own = objective.statistics(Own(views, pairs, scale, own.numbers, bias))
        self.totals = _add_up({name: value.detach() for name, value in self.own.items()}, add_over_ranks)

    def pull(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str | Product, Tensor]:
        """d loss / d this rank's features, own logits, scale and bias, through the statistics.

        `own` is each rank's share of d loss / d statistic, `shared` is the same on all.
        """
        alive = {name: value for name, value in self.own.items() if value.requires_grad}
        if not alive:
            return {}
        worth = _worth(alive, own, shared, self.add_over_ranks)
        found = torch.autograd.grad(list(alive.values()), list(self.inputs.values()), worth, allow_unused=True)
        return {name: gradient for name, gradient in zip(self.inputs, found, strict=True) if gradient is not None}


class RowSums:
    """`Objective.row_sums`: sums of what the sweeps have reduced."""

    totals: Mapping[str, Tensor]
    """Over the global batch, in the loss's dtype."""

    def __init__(self, objective: Objective, totals: Totals, own: Own, *, count: int, add_over_ranks: AddOverRanks) -> None:
        self.objective, self.reduced, self.pairs, self.count, self.add_over_ranks = objective, totals, own, count, add_over_ranks
        sums = objective.row_sums(rows_of(totals, own=own, count=count, statistics={}))
        self.totals = _add_up({name: value.detach() for name, value in sums.items()}, add_over_ranks)

    def pull(self, finished: Finished, shared: Mapping[str, Tensor]) -> Finished:
        """What everything is worth directly and through the sums; `shared` is d batch loss / d statistic, the same on all ranks."""
        if not self.totals:
            return finished
        watched = Watched(self.reduced, self.pairs, {})
        with torch.enable_grad():
            sums = self.objective.row_sums(watched.rows(self.count))
            worth = _worth(sums, finished.statistics, shared, self.add_over_ranks)
            value = torch.stack([(weight * value).sum() for weight, value in zip(worth, sums.values(), strict=True)]).sum()
        return finished.plus(watched.worth(value))


def _worth(
    named: Mapping[str, Tensor], own: Mapping[str, Tensor], shared: Mapping[str, Tensor], add_over_ranks: AddOverRanks
) -> list[Tensor]:
    """d global loss / d each: every rank's share added up, and what is the same on all."""
    total = _add_up({name: own[name] for name in named}, add_over_ranks)
    return [total[name] + shared[name] if name in shared else total[name] for name in named]


def _add_up(named: Mapping[str, Tensor], add_over_ranks: AddOverRanks) -> dict[str, Tensor]:
    """The same tensors, added over ranks in float64."""
    if not named:
        return {}
    flat = add_over_ranks(torch.cat([tensor.to(torch.float64).flatten() for tensor in named.values()]))
    parts = torch.split(flat, [tensor.numel() for tensor in named.values()])
    return {name: part.reshape(tensor.shape).to(tensor.dtype) for (name, tensor), part in zip(named.items(), parts, strict=True)}
