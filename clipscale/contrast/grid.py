"""Grid: ranks as R×C, each logit of the global batch computed once in the world and serving both directions.

Ranks of a grid row gather their x, ranks of a grid column their y; rank (p, q) sweeps the block of row p's x against column q's y, tile
by tile. Its own pairs' rows are finished by itself: the partial rows of x come from its grid row, those of y from its grid column.
Features and their gradients cross the network 2(R−1) + 2(C−1) times b·D numbers, the least possible when each logit is computed once:
a rank with B²/W of them must see at least 2B/√W vectors. One rank alone is a 1×1 grid and sends nothing.

Legend: b pairs on this rank, B in the global batch, D embedding width, W = R·C ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clipscale.contrast.logits import effective_bias, to_cosine, to_logits, unit_guide
from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import SIDES, Finished, Gradients, Result, Tally, finish
from clipscale.contrast.tiled import HARDEST, Layout, Samples, TiledBlock
from clipscale.objectives import Pull, Side
from clipscale.parallel.collectives import exchange_rows, gather_rows


def grid_loss(request: Request, agreement: Agreement, *, grid_rows: int | None) -> Result:
    """The exact loss over all ranks' pairs on a grid of `grid_rows` × W/grid_rows ranks; None: as square as can be."""
    return _GridLoss(request, agreement, grid_rows).run()


class Line:
    """The ranks of this rank's grid row or column."""

    def __init__(self, ranks: Sequence[int], own: int, group: dist.ProcessGroup | None, agreement: Agreement) -> None:
        self.group, self.own = group, own
        self.sizes = [agreement.sizes[rank] for rank in ranks]
        starts = [sum(agreement.sizes[:rank]) for rank in ranks]
        self.index = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, self.sizes, strict=True)])

    def gather(self, rows: Tensor) -> Tensor:
        """[b, ...] -> [sum of the line's b, ...]."""
        return gather_rows(rows, self.sizes, self.group)

    def exchange(self, rows: Tensor) -> Tensor:
        """[sum of the line's b, ...] -> [ranks, b, ...]: what each rank of the line holds for this rank's rows."""
        return exchange_rows(rows, self.sizes, self.own, self.group)

    def add_up(self, rows: Tensor) -> Tensor:
        """[sum of the line's b, ...] -> [b, ...]: what the ranks hold for this rank's rows, added in rank order."""
        parts = self.exchange(rows)
        return parts[0] if len(parts) == 1 else parts.sum(0)

    def samples(self, features: Tensor, ids: Tensor | None, guide: Tensor | None) -> Samples:
        """All samples of the line, of one side."""
        return Samples(
            features=self.gather(features),
            index=self.index,
            ids=None if ids is None else self.gather(ids),
            guide=None if guide is None else self.gather(guide),
        )


class _GridLoss:
    def __init__(self, request: Request, agreement: Agreement, grid_rows: int | None) -> None:
        pairs, dtype = request.pairs, request.dtype
        grid = request.mesh.grid(grid_rows)
        self.request, self.agreement = request, agreement
        self.x, self.y = pairs.x.detach().to(dtype), pairs.y.detach().to(dtype)
        self.scale = request.scale.detach().to(dtype).reshape(())
        self.bias = effective_bias(request)
        self.x_line = Line(grid.row_ranks, grid.column, grid.row_group, agreement)
        self.y_line = Line(grid.column_ranks, grid.row, grid.column_group, agreement)
        guide = unit_guide(request, agreement)
        self.layout = Layout(request.objective, like=self.x)
        self.block = TiledBlock(
            objective=request.objective,
            x=self.x_line.samples(pairs.x, pairs.ids, guide),
            y=self.y_line.samples(pairs.y, pairs.ids, guide),
            scale=self.scale,
            bias=self.bias,
            layout=self.layout,
            settings=request.settings,
        )

    def run(self) -> Result:
        x_partial, y_partial = self.block.partials()
        own: dict[Side, Tensor] = {
            "x": self.layout.merge("x", self.x_line.exchange(x_partial)),
            "y": self.layout.merge("y", self.y_line.exchange(y_partial)),
        }
        cosine = (self.x * self.y).sum(1)
        count = self.agreement.count
        finished = finish(self.request.objective, self.layout, own, to_logits(cosine, self.scale, self.bias), count=count)
        hardest = {side: to_cosine(self.layout.split(side, own[side])[HARDEST][:, 0], self.scale, self.bias) for side in SIDES}
        told = self.request.mesh.gather(torch.cat([finished.loss.reshape(1), Tally.of(cosine, hardest).numbers])).sum(0)
        gradients = self._gradients(finished) if self.agreement.wants_gradients else None
        return Result(told[0].to(self.scale.dtype), Tally(told[1:]).metrics(count=count), gradients)

    def _gradients(self, finished: Finished) -> Gradients:
        """Second sweep, then every rank's part of a row's gradient goes to the row's owner."""
        swept = self.block.gradients(
            _gather_pulls(self.x_line, finished.pulls["x"]),
            _gather_pulls(self.y_line, finished.pulls["y"]),
        )
        pair = finished.positive.unsqueeze(1)
        x = self.x_line.add_up(swept.x).addcmul_(pair, self.y)  # in place: these are the largest tensors there are
        y = self.y_line.add_up(swept.y).addcmul_(pair, self.x)
        scale = (self.x * x).sum(1).sum(dtype=torch.float64)  # Σ_j d loss/d logit_ij · cosine_ij, for this rank's rows
        bias = swept.bias if self.bias is None else swept.bias + finished.positive.sum(dtype=torch.float64)
        return Gradients(x.mul_(self.scale), y.mul_(self.scale), scale, bias)


def _gather_pulls(line: Line, pulls: dict[str, Pull]) -> dict[str, Pull]:
    """Finished rows of the whole line: each [b] -> [sum of the line's b]."""
    own = torch.stack([number for pull in pulls.values() for number in pull], dim=1)
    columns = line.gather(own).unbind(1)
    return {name: Pull(columns[2 * place], columns[2 * place + 1]) for place, name in enumerate(pulls)}
