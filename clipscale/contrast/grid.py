"""Grid: ranks as R×C, each logit of the global batch computed once in the world and serving both directions.

Ranks of a grid row gather their x, ranks of a grid column their y; rank (p, q) sweeps the block of row p's x against column q's y, tile
by tile. Its own pairs' rows are finished by itself: the partial rows of x come from its grid row, those of y from its grid column.
Features and their gradients cross the network 2(R−1) + 2(C−1) times b·D numbers, the least possible when each logit is computed once:
a rank with B²/W of them must see at least 2B/√W vectors. One rank alone is a 1×1 grid and sends nothing.

Everything else that an objective may ask for travels the same lines: further views, numbers of the pairs, terms of earlier sweeps, and
extra samples of one side (blocks of their own: all x against the extra y).

Legend: b pairs on this rank, B in the global batch, D embedding width, W = R·C ranks, n and m pairs of this rank's grid row and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.backends import Backend, Samples
from clipscale.contrast.choose import choose_backend
from clipscale.contrast.layout import HARDEST, SIDES, Layout, layouts_of, numbers_of, reduced_before
from clipscale.contrast.line import Line
from clipscale.contrast.logits import effective_bias, to_cosine, to_logits, unit_guide
from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import (
    Finished,
    Gradients,
    Result,
    Tally,
    Totals,
    add_scaled_rows,
    finish,
    pairs_of_views,
    row_dots,
    share_of_batch_loss,
    sum_in_order,
)
from clipscale.contrast.statistics import RowSums, Statistics
from clipscale.contrast.tiled import Into, Sums, TiledBlock
from clipscale.objectives import MAIN, Own, Product, Pull, Side


def grid_loss(request: Request, agreement: Agreement) -> Result:
    """The exact loss over all ranks' pairs on a grid of `grid_rows` × W/grid_rows ranks; by default as square as can be."""
    return _GridLoss(request, agreement).run()


class _GridLoss:
    def __init__(self, request: Request, agreement: Agreement) -> None:
        pairs, objective = request.pairs, request.objective
        self.request, self.agreement, self.objective = request, agreement, objective
        self.grid = request.mesh.grid(request.settings.grid_rows)
        self.scale = request.scale.detach().to(request.dtype).reshape(())
        self.bias = effective_bias(request)
        self.features = {view: features.detach() for view, features in pairs.features(objective).items()}
        self.numbers = {name: _in_dtype(pairs.numbers[name].detach(), request.dtype) for name in numbers_of(objective)}
        self.lines = self._lines_of(agreement.sizes)
        self.extra_lines = {name: self._lines_of(sizes) for name, sizes in agreement.extras.items()}
        self.layouts = layouts_of(objective, like=self.scale.new_zeros(0))
        self.backend = self._backend()
        self.blocks = self._blocks()
        self.own = self._own()

    def _lines_of(self, sizes: list[int]) -> dict[Side, Line]:
        grid, settings = self.grid, self.request.settings
        return {
            "x": Line(grid.row_ranks, grid.column, grid.row_group, sizes, settings),
            "y": Line(grid.column_ranks, grid.row, grid.column_group, sizes, settings),
        }

    def _backend(self) -> Backend:
        wanted = {name for name in self.numbers if name in self.agreement.wanted}
        return choose_backend(self.request, vectors=frozenset(wanted | set(reduced_before(self.layouts[:-1]))))

    def _blocks(self) -> list[TiledBlock]:
        """The pairs against each other, and every sort of extra samples against all pairs of the other side."""
        request, objective = self.request, self.objective
        guide, ids = unit_guide(request, self.agreement), request.pairs.ids
        rows, columns = (self._samples(side, guide, ids) for side in SIDES)
        budget = request.settings.cache_for(len(rows) * len(columns) * self.scale.element_size() * len(objective.products))
        pairs = TiledBlock(rows, columns, {product: product for product in objective.products}, self.scale, self.bias, self.backend, budget)
        blocks = [pairs]
        for name, tensor in request.pairs.extras().items():
            side: Side = "x" if name == "extra_x" else "y"
            line = self.extra_lines[name][side]
            extra = Samples({name: line.gather_features(tensor)}, torch.full((sum(line.sizes),), -1))
            names = (name, "y") if side == "x" else ("x", name)
            both = (extra, columns) if side == "x" else (rows, extra)
            blocks.append(TiledBlock(*both, {MAIN: names}, self.scale, self.bias, self.backend, 0, extra=side))
        return blocks

    def _samples(self, side: Side, guide: Tensor | None, ids: Tensor | None) -> Samples:
        line, place = self.lines[side], 0 if side == "x" else 1
        needed = dict.fromkeys(product[place] for product in self.objective.products)
        if any(name != f"extra_{side}" for name in self.agreement.extras):
            needed[side] = None
        return Samples(
            features={view: line.gather_features(self.features[view]) for view in needed},
            index=line.index(),
            ids=None if ids is None else line.gather(ids),
            guide=None if guide is None else line.gather(guide),
            numbers={name: line.gather(number) for name, number in self.numbers.items()},
        )

    def _own(self) -> Own:
        cosines = {(a, b): row_dots(self.features[a], self.features[b].to(self.scale.dtype)) for a, b in pairs_of_views(self.objective)}
        logits = {pair: to_logits(cosine, self.scale, self.bias if pair == MAIN else None) for pair, cosine in cosines.items()}
        return Own(self.features, logits, self.scale, self.numbers, self.bias)

    def run(self) -> Result:
        partials: list[dict[Side, Tensor]] = []
        totals: Totals = {"x": {}, "y": {}}
        reduced: list[Totals] = []
        hardest: dict[Side, Tensor] = {}
        statistics = Statistics(self.objective, self.own, add_over_ranks=self.add_over_ranks)
        count = self.agreement.count
        backward = _Backward(self) if self.agreement.wanted else None
        for layout in self.layouts:
            reduced.append({side: dict(self.gather_vectors(side, totals[side])) for side in SIDES} if partials else {})
            if backward is not None and self.objective.one_sweep:
                partials.append(self._to_owners(layout, backward.sweep_once(layout, statistics.totals)))
            else:
                partials.append(self._to_owners(layout, [block.partials(layout, reduced[-1]) for block in self.blocks]))
            for side in SIDES:
                totals[side] |= layout.totals(side, partials[-1][side])
                if HARDEST in totals[side]:
                    hardest[side] = to_cosine(totals[side].pop(HARDEST), self.scale, self.bias)
        sums = RowSums(self.objective, totals, self.own, count=count, add_over_ranks=self.add_over_ranks)
        known = {**statistics.totals, **sums.totals}
        finished = finish(self.objective, totals, self.own, known, count=count)
        batch_loss, batch_gradients = share_of_batch_loss(self.objective, known, count=count)
        cosine = to_cosine(self.own.pairs[MAIN], self.scale, self.bias)
        told = self.add_over_ranks(torch.cat([finished.loss.reshape(1), Tally.of(cosine, hardest).numbers]))
        loss = told[0] if batch_loss is None else told[0] + batch_loss
        metrics = Tally(told[1:]).metrics(count=count, with_hardest=bool(hardest))
        gradients = None
        if backward is not None:
            through_statistics = statistics.pull(finished.statistics, batch_gradients)
            gradients = backward.run(sums.pull(finished, batch_gradients), through_statistics, _Forward(partials, totals, reduced))
        return Result(loss.to(self.scale.dtype), metrics, gradients)

    def _to_owners(self, layout: Layout, found: list[dict[Side, Tensor]]) -> dict[Side, Tensor]:
        """Partial rows of all blocks and ranks, merged by their owners: [b, K]."""
        merged: dict[Side, Tensor] = {}
        for side in SIDES:
            partial = layout.merge(side, [part[side] for part in found if side in part])
            merged[side] = layout.merge(side, self.lines[side].exchange(partial))
        return merged

    def gather_vectors(self, side: Side, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Numbers of this rank's pairs, of the whole line: each [b] -> [n] or [m]."""
        if not own:
            return {}
        columns = self.lines[side].gather(torch.stack(list(own.values()), dim=1)).unbind(1)
        return dict(zip(own, columns, strict=True))

    def add_over_ranks(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each: along grid rows, then of the grid rows' sums along columns."""
        for line in self.lines.values():
            numbers = sum_in_order(list(line.gather_equal(numbers)))
        return numbers


class _Forward(NamedTuple):
    """What the sweeps have reduced."""

    partials: list[dict[Side, Tensor]]
    """By sweep: this rank's pairs, [b, K]."""
    totals: Totals
    reduced: list[Totals]
    """By sweep: terms of earlier ones, of the whole line."""


class _Backward:
    """The sweeps in reverse order, then every rank's part of a gradient goes to its owner."""

    def __init__(self, loss: _GridLoss) -> None:
        self.loss = loss
        self.wanted, self.dtype = loss.agreement.wanted, loss.scale.dtype
        nothing = torch.zeros((), dtype=torch.float64, device=loss.scale.device)
        self.into = Into(self._sums(), bias=nothing, scale=nothing.clone())
        self.assumed: Totals | None = None

    def _sums(self) -> dict[Side, Sums]:
        """Zeros for all that is wanted; the scale's gradient needs one side to be complete."""
        names: dict[Side, dict[str, Tensor]] = {"x": {}, "y": {}}
        for block in self.loss.blocks:
            for row_name, column_name in block.products.values():
                names["x"][row_name] = block.rows.features[row_name]
                names["y"][column_name] = block.columns.features[column_name]
        complete = any(set(names[side]) <= self.wanted for side in SIDES)
        keep = {side: {name for name in names[side] if name in self.wanted} for side in SIDES}
        if "scale" in self.wanted and not complete and not self.loss.backend.tells_scale:
            keep["x"] = set(names["x"])
        self.scale_side: Side = "x" if keep["x"] == set(names["x"]) else "y"
        return {
            side: Sums({name: torch.zeros_like(names[side][name], dtype=self.dtype) for name in sorted(keep[side])}, {}) for side in SIDES
        }

    def sweep_once(self, layout: Layout, statistics: Mapping[str, Tensor]) -> list[dict[Side, Tensor]]:
        """Add all gradients of an objective's terms while they are reduced; what each block's rows and columns reduce to."""
        loss = self.loss
        nothing = {side: {name: loss.scale.new_zeros(len(loss.own.pairs[MAIN])) for name in layout.names(side)} for side in SIDES}
        self.assumed = finish(loss.objective, nothing, loss.own, statistics, count=loss.agreement.count).totals
        self._make_room({})
        pulls = {}
        for side in SIDES:
            shares = loss.gather_vectors(side, self.assumed[side])
            pulls[side] = {name: Pull(torch.zeros_like(share), share) for name, share in shares.items()}  # a sum asks for no total
        return [block.partials_and_gradients(layout, pulls, self.into) for block in loss.blocks]

    def run(self, finished: Finished, through_statistics: Mapping[str | Product, Tensor], forward: _Forward) -> Gradients:
        worth = {side: dict(finished.totals[side]) for side in SIDES}
        numbers = dict(finished.numbers)
        if self.assumed is not None:
            self._check_assumption(finished)
            self._hand_back(numbers, worth)
        for layout in reversed(self.loss.layouts if self.assumed is None else []):
            if not layout.has_gradient:
                continue
            self._make_room(forward.reduced[layout.sweep])
            pulls = {side: self._pulls(side, layout, worth[side], forward) for side in SIDES}
            for block in self.loss.blocks:
                block.add_gradients(layout, pulls, forward.reduced[layout.sweep], self.into)
            self._hand_back(numbers, worth)
        return self._finish(finished, through_statistics, numbers)

    def _check_assumption(self, finished: Finished) -> None:
        """An objective that wrongly says `one_sweep` would have wrong gradients."""
        assert self.assumed is not None
        for side in SIDES:
            for name, share in self.assumed[side].items():
                if not torch.equal(share, finished.totals[side][name]):
                    raise TypeError(
                        f"objective {type(self.loss.objective).__name__} says one_sweep, but d loss / d '{name}' depends on its terms; "
                        "remove one_sweep from the class"
                    )

    def _make_room(self, reduced: Totals) -> None:
        """Zeros for numbers that want a gradient and, in later sweeps, for the terms reduced before."""
        for side in SIDES:
            vectors = {name: number for name, number in self._samples(side).numbers.items() if name in self.wanted}
            vectors |= reduced.get(side, {})
            self.into.sides[side].vectors = {name: torch.zeros_like(vector) for name, vector in vectors.items()}

    def _hand_back(self, numbers: dict[str, Tensor], worth: Mapping[Side, dict[str, Tensor]]) -> None:
        """What a sweep has found for numbers and for terms reduced before, to the pairs' owners."""
        for side in SIDES:
            for name, vector in self.into.sides[side].vectors.items():
                target = numbers if name in numbers else worth[side]
                target[name] = target[name] + self.loss.lines[side].add_up(vector)

    def _samples(self, side: Side) -> Samples:
        block = self.loss.blocks[0]
        return block.rows if side == "x" else block.columns

    def _pulls(self, side: Side, layout: Layout, worth: Mapping[str, Tensor], forward: _Forward) -> Mapping[str, Pull]:
        """Finished rows of the whole line: each [b] -> [n] or [m]."""
        split = layout.split(side, forward.partials[layout.sweep][side])
        vectors: dict[str, Tensor] = {}
        for name in layout.names(side):
            vectors[f"total {name}"] = forward.totals[side][name]
            vectors[f"share {name}"] = layout.terms[side][name].share(split[name], worth[name])
        gathered = self.loss.gather_vectors(side, vectors)
        return {name: Pull(gathered[f"total {name}"], gathered[f"share {name}"]) for name in layout.names(side)}

    def _finish(self, finished: Finished, through_statistics: Mapping[str | Product, Tensor], numbers: Mapping[str, Tensor]) -> Gradients:
        """Each rank's part of a feature's gradient to the owner, then the pairs' own logits."""
        loss = self.loss
        bias = self.into.bias + finished.bias.to(torch.float64) + through_statistics.get("bias", 0)
        scale = self.into.scale + finished.scale.to(torch.float64) + through_statistics.get("scale", 0)
        every = {**loss.features, **loss.request.pairs.extras()}
        leaves: dict[str, Tensor] = {name: number for name, number in numbers.items() if name in self.wanted}
        for side in SIDES:
            features = self.into.sides[side].features
            for name in list(features):
                line = loss.extra_lines[name][side] if name in loss.extra_lines else loss.lines[side]
                own = line.add_up_gradients(features.pop(name))
                if side == self.scale_side and not loss.backend.tells_scale:  # Σ d loss / d logit · cosine, for this rank's samples
                    scale = scale + row_dots(every[name], own).sum(dtype=torch.float64)
                if name in self.wanted:
                    leaves[name] = own if name not in leaves else leaves[name].add_(own)
        for (one, other), pair in finished.pairs.items():
            worth = pair + through_statistics.get((one, other), 0)
            for target, source in ((one, other), (other, one)):
                if target in self.wanted:
                    if target not in leaves:
                        leaves[target] = torch.zeros_like(loss.features[target], dtype=self.dtype)
                    add_scaled_rows(leaves[target], worth, loss.features[source])
            logits = loss.own.pairs[one, other]
            bias_of = loss.bias if (one, other) == MAIN else None
            scale = scale + (worth * to_cosine(logits, loss.scale, bias_of)).sum(dtype=torch.float64)
            if bias_of is not None:
                bias = bias + worth.sum(dtype=torch.float64)
        for name in leaves:
            if name not in loss.numbers:
                leaves[name].mul_(loss.scale)
                if name in through_statistics:
                    leaves[name].add_(through_statistics[name])
        return Gradients(leaves, scale, bias)


def _in_dtype(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype) if numbers.is_floating_point() else numbers
