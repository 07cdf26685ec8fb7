"""Dense: the textbook loss. Every rank gathers everything and holds the whole matrix of logits; the reference for all other methods.

Terms are reduced in torch's own words and all gradients come from autograd. Each rank keeps its own rows' gradients; those of scale and
bias, which every rank computes in full, are divided by the number of ranks, so that adding over ranks gives them once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipscale.contrast.layout import HARDEST, SIDES, numbers_of, seen_by, sweep_terms
from clipscale.contrast.logits import effective_bias, to_cosine, to_logits, unit_guide
from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import Gradients, Result, Tally, Totals, pairs_of_views, rows_of
from clipscale.objectives import MAIN, Block, Own, Side, Term
from clipscale.parallel.collectives import gather_rows


def dense_loss(request: Request, agreement: Agreement) -> Result:
    """The exact loss over all ranks' pairs, from the full B×B matrix on every rank."""
    gathered = _gather_leaves(request, agreement)
    with torch.enable_grad():
        leaves = {name: tensor.requires_grad_() if tensor.is_floating_point() else tensor for name, tensor in gathered.items()}
        scale = request.scale.detach().to(request.dtype).reshape(()).requires_grad_()
        bias = effective_bias(request)
        bias = bias if bias is None else bias.clone().requires_grad_()
        loss, tally, with_hardest = _Dense(request, agreement, leaves, scale, bias).loss()
    metrics = tally.metrics(count=agreement.count, with_hardest=with_hardest)
    gradients = _own_gradients(loss, leaves, scale, bias, request, agreement) if agreement.wanted else None
    return Result(loss.detach().to(request.dtype), metrics, gradients)


def _gather_leaves(request: Request, agreement: Agreement) -> dict[str, Tensor]:
    """Everything a gradient may flow to, and whole-numbered numbers, of all ranks."""
    pairs, objective = request.pairs, request.objective
    every = {**pairs.leaves(objective), **{name: pairs.numbers[name] for name in numbers_of(objective)}}
    gathered = {}
    for name, tensor in every.items():
        own = tensor.detach()
        own = own.to(request.dtype) if own.is_floating_point() else own
        gathered[name] = gather_rows(own, agreement.extras.get(name, agreement.sizes), request.mesh.everyone).clone()
    return gathered


class _Dense:
    def __init__(self, request: Request, agreement: Agreement, leaves: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None) -> None:
        self.request, self.agreement, self.objective = request, agreement, request.objective
        self.leaves, self.scale, self.bias = leaves, scale, bias
        self.numbers = {name: leaves[name] for name in numbers_of(self.objective)}
        views = {view: leaves[view] for view in self.objective.views}
        pairs = {(a, b): self._scaled((views[a] * views[b]).sum(1), main=(a, b) == MAIN) for a, b in pairs_of_views(self.objective)}
        self.own = Own(views, pairs, scale, self.numbers, bias)

    def _scaled(self, cosine: Tensor, *, main: bool) -> Tensor:
        return to_logits(cosine, self.scale, self.bias if main else None)

    def loss(self) -> tuple[Tensor, Tally, bool]:
        """The loss with its graph, and what the metrics need."""
        blocks, totals = self._blocks(), Totals({"x": {}, "y": {}})
        for sweep in range(1 + len(self.objective.later_sweeps())):
            for side, terms in self._terms(blocks, sweep, totals).items():
                totals[side] |= {name: _reduce(parts, side) for name, parts in terms.items()}
        cosine = to_cosine(self.own.pairs[MAIN], self.scale, self.bias).detach()
        hardest = {side: to_cosine(totals[side].pop(HARDEST), self.scale, self.bias).detach() for side in SIDES if HARDEST in totals[side]}
        statistics, count = self.objective.statistics(self.own), self.agreement.count
        statistics = statistics | self.objective.row_sums(rows_of(totals, own=self.own, count=count, statistics={}))
        rows = rows_of(totals, own=self.own, count=count, statistics=statistics)
        loss = self.objective.pair_loss(rows).sum(dtype=torch.float64) / count
        batch_loss = self.objective.batch_loss(statistics, count=count) if statistics else None
        return (loss if batch_loss is None else loss + batch_loss), Tally.of(cosine, hardest), bool(hardest)

    def _blocks(self) -> list[Block]:
        count, leaves = self.agreement.count, self.leaves
        guide, ids = unit_guide(self.request, self.agreement), self.request.pairs.ids
        guide, ids = (
            None if rows is None else gather_rows(rows, self.agreement.sizes, self.request.mesh.everyone) for rows in (guide, ids)
        )
        products = {(a, b): self._scaled(leaves[a] @ leaves[b].T, main=(a, b) == MAIN) for a, b in self.objective.products}
        blocks = [
            Block(
                products=products,
                positive=torch.eye(count, dtype=torch.bool, device=self.scale.device),
                same_text=None if ids is None else ids.unsqueeze(1) == ids,
                guide=None if guide is None else guide @ guide.T,
                scale=self.scale,
                bias=self.bias,
                numbers={name: (number.unsqueeze(1), number.unsqueeze(0)) for name, number in self.numbers.items()},
            )
        ]
        extras: list[tuple[Side, str, str, str]] = [("x", "extra_x", "extra_x", "y"), ("y", "extra_y", "x", "extra_y")]
        for side, name, rows, columns in extras:
            if name in self.agreement.extras:
                logits = self._scaled(leaves[rows] @ leaves[columns].T, main=True)
                blocks.append(
                    Block({MAIN: logits}, positive=None, same_text=None, guide=None, scale=self.scale, bias=self.bias, extra=side)
                )
        return blocks

    def _gather(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else gather_rows(rows, self.agreement.sizes, self.request.mesh.everyone)

    def _terms(self, blocks: list[Block], sweep: int, totals: Totals) -> dict[Side, dict[str, list[Term]]]:
        """By side and name, the terms of all blocks that the side's samples meet."""
        found: dict[Side, dict[str, list[Term]]] = {"x": {}, "y": {}}
        for block in blocks:
            seen = {} if block.extra else seen_by(*(_without_hardest(totals[side]) for side in SIDES))
            for name, parts in sweep_terms(self.objective, sweep, Block(**{**vars(block), "reduced": seen})).items():
                for side in SIDES:
                    serving = [part for part in parts if part.serves(side) and block.extra != side]
                    if serving:
                        found[side].setdefault(name, []).extend(serving)
        return found


def _without_hardest(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: total for name, total in totals.items() if name != HARDEST}


def _reduce(parts: list[Term], side: Side) -> Tensor:
    """Terms of one name over all that a side's samples meet, as one reduction of one long row."""
    filled = torch.cat([part.filled if side == "x" else part.filled.T for part in parts], dim=1)
    return parts[0].over(filled).reduce(1)


def _own_gradients(
    loss: Tensor, leaves: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None, request: Request, agreement: Agreement
) -> Gradients:
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad} | {"scale": scale}
    inputs |= {} if bias is None else {"bias": bias}
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in zip(inputs.items(), found, strict=True)
    }
    rank, world = request.mesh.rank, request.mesh.world
    own = {}
    for name in leaves:
        if name in agreement.wanted:
            sizes = agreement.extras.get(name, agreement.sizes)
            start = sum(sizes[:rank])
            own[name] = gradients[name][start : start + sizes[rank]]
    bias_gradient = gradients["bias"] if bias is not None else torch.zeros_like(scale)
    return Gradients(own, gradients["scale"] / world, bias_gradient / world)
