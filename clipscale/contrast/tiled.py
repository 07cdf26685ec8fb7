"""Tiled: one rank's block of logits, swept tile by tile and never held whole.

The first sweep reduces every term of the objective along rows and along columns. The second makes each tile again, asks the terms for
d loss / d logits and adds it into the gradients of the embeddings. A logit is computed once a sweep and serves both directions.

Legend: the block has n x-samples (rows) and m y-samples (columns); D embedding width, K numbers that hold a partially reduced row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.settings import ContrastSettings
from clipscale.objectives import Block, Max, Objective, Pull, Side, Term

HARDEST = "hardest negative"
"""The engine's own term, for the metrics: the largest logit among combinations of different captions."""


@dataclass(frozen=True)
class Samples:
    """One side of a block."""

    features: Tensor
    """[n, D]."""
    index: Tensor
    """Number of each sample's pair in the global batch, ascending, on the CPU: [n]."""
    ids: Tensor | None
    """[n]."""
    guide: Tensor | None
    """Normalised guide features: [n, Dg]."""


class BlockGradients(NamedTuple):
    """Gradients of a block's inputs, positives left out."""

    x: Tensor
    """d loss / d x, for logits of scale 1: [n, D]."""
    y: Tensor
    """[m, D]."""
    bias: Tensor
    """Σ d loss / d logit, float64."""


class Layout:
    """Where each term's numbers stand in the partial rows [n, K] of a side; learnt from an objective's terms of an empty block."""

    def __init__(self, objective: Objective, *, like: Tensor) -> None:
        nothing = like.new_zeros(0, 0)
        mask = torch.zeros(0, 0, dtype=torch.bool, device=like.device)
        terms = with_hardest(objective, Block(nothing, positive=mask, same_text=mask, guide=nothing))
        self.terms: dict[Side, dict[str, type[Term]]] = {
            side: {name: type(term) for name, term in terms.items() if term.serves(side)} for side in ("x", "y")
        }
        self.like = like

    def split(self, side: Side, partial: Tensor) -> dict[str, Tensor]:
        """Partial rows by term: [n, K] -> each [n, k]."""
        widths = [term.width for term in self.terms[side].values()]
        return dict(zip(self.terms[side], torch.split(partial, widths, dim=1), strict=True))

    def nothing(self, side: Side, rows: int) -> Tensor:
        """Rows into which nothing has been reduced yet: [rows, K]."""
        return torch.cat([term.nothing(rows, self.like) for term in self.terms[side].values()], dim=1)

    def merge(self, side: Side, partials: Sequence[Tensor] | Tensor) -> Tensor:
        """Partial reductions of the same rows as one, in their order: each [n, K] -> [n, K]."""
        merged = partials[0]
        for partial in partials[1:]:
            one, other = self.split(side, merged), self.split(side, partial)
            merged = torch.cat([term.merge(one[name], other[name]) for name, term in self.terms[side].items()], dim=1)
        return merged


def with_hardest(objective: Objective, block: Block) -> dict[str, Term]:
    """The objective's terms and the engine's own."""
    return {**objective.terms(block), HARDEST: Max(block.logits.detach(), block.left_out("ignored"))}


@dataclass(frozen=True)
class TiledBlock:
    """The logits of x samples against y samples, available tile by tile."""

    objective: Objective
    x: Samples
    y: Samples
    scale: Tensor
    """0-d, in the dtype that everything is computed in."""
    bias: Tensor | None
    layout: Layout
    settings: ContrastSettings

    def partials(self) -> tuple[Tensor, Tensor]:
        """First sweep: all terms, reduced over this block: [n, K] for the x side and [m, K] for the y side."""
        rows_partial = self.layout.nothing("x", len(self.x.index))
        columns_partial = self.layout.nothing("y", len(self.y.index))
        for rows, columns in self._tiles():
            found = {name: (term, *term.partials()) for name, term in with_hardest(self.objective, self._tile(rows, columns)).items()}
            along_rows = torch.cat([by_row for term, by_row, _ in found.values() if term.serves("x")], dim=1)
            along_columns = torch.cat([by_column for term, _, by_column in found.values() if term.serves("y")], dim=1)
            rows_partial[rows] = self.layout.merge("x", (rows_partial[rows], along_rows))
            columns_partial[columns] = self.layout.merge("y", (columns_partial[columns], along_columns))
        return rows_partial, columns_partial

    def gradients(self, x_pulls: Mapping[str, Pull], y_pulls: Mapping[str, Pull]) -> BlockGradients:
        """Second sweep: gradients of the loss, given the finished terms of all rows and all columns."""
        gradient_x = torch.zeros_like(self.x.features, dtype=self.scale.dtype)
        gradient_y = torch.zeros_like(self.y.features, dtype=self.scale.dtype)
        gradient_bias = torch.zeros((), dtype=torch.float64, device=self.scale.device)
        for rows, columns in self._tiles():
            tile = self._tile(rows, columns)
            gradient = self._logit_gradient(tile, _cut(x_pulls, rows), _cut(y_pulls, columns))
            gradient_x[rows].addmm_(gradient, self.y.features[columns].to(gradient.dtype))
            gradient_y[columns].addmm_(gradient.T, self.x.features[rows].to(gradient.dtype))
            if self.bias is not None:
                gradient_bias += gradient.sum()
        return BlockGradients(gradient_x, gradient_y, gradient_bias)

    def _logit_gradient(self, tile: Block, x_pulls: Mapping[str, Pull], y_pulls: Mapping[str, Pull]) -> Tensor:
        """d loss / d logits of a tile: each term's pull on its values, carried through the objective's own formula by autograd."""
        logits = tile.logits.requires_grad_()
        with torch.enable_grad():
            terms = self.objective.terms(replace(tile, logits=logits))
            pulled = {name: term for name, term in terms.items() if term.filled.requires_grad}
        pulls = [term.pull(x_pulls.get(name), y_pulls.get(name)) for name, term in pulled.items()]
        if not pulls:
            return torch.zeros_like(logits)
        return torch.autograd.grad([term.filled for term in pulled.values()], logits, pulls)[0]

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, len(self.x.index), self.settings.tile_rows):
            for column in range(0, len(self.y.index), self.settings.tile_columns):
                yield slice(row, row + self.settings.tile_rows), slice(column, column + self.settings.tile_columns)

    def _tile(self, rows: slice, columns: slice) -> Block:
        dtype = self.scale.dtype
        logits = (self.x.features[rows].to(dtype) @ self.y.features[columns].to(dtype).T).mul_(self.scale)
        if self.bias is not None:
            logits += self.bias
        guide = None
        if self.x.guide is not None and self.y.guide is not None:
            guide = self.x.guide[rows] @ self.y.guide[columns].T
        same_text = None
        if self.x.ids is not None and self.y.ids is not None:
            same_text = self.x.ids[rows].unsqueeze(1) == self.y.ids[columns]
        return Block(logits, positive=self._positive(rows, columns), same_text=same_text, guide=guide)

    def _positive(self, rows: slice, columns: slice) -> Tensor | None:
        x_index, y_index = self.x.index[rows], self.y.index[columns]
        if x_index[-1] < y_index[0] or y_index[-1] < x_index[0]:
            return None
        return (x_index.unsqueeze(1) == y_index).to(self.scale.device)


def _cut(pulls: Mapping[str, Pull], rows: slice) -> dict[str, Pull]:
    return {name: Pull(pull.total[rows], pull.share[rows]) for name, pull in pulls.items()}
