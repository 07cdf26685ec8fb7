"""Tiled: one rank's block of logits, swept tile by tile and never held whole.

The first sweep reduces every term of the objective along rows and along columns; further ones, if the objective asks, reduce terms that
depend on those. On the way back each sweep makes its tiles again (or takes them from a cache), asks for d loss / d logits and adds it into
the gradients of the embeddings. A logit is computed once a sweep and serves both directions.

Legend: the block has n rows and m columns; D embedding width, K numbers that hold a partially reduced row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.backends import Backend, Samples, SweepKind, Tile
from clipscale.contrast.layout import SIDES, Layout, seen_by
from clipscale.objectives import MAIN, Block, Product, Pull, Side

Reduced = Mapping[Side, Mapping[str, Tensor]]
"""Terms of earlier sweeps, finished, of a block's rows and of its columns: [n] and [m]."""
Pulls = Mapping[Side, Mapping[str, Pull]]


@dataclass
class Sums:
    """Where the gradients of one side of a block are added up; names that are absent are not wanted."""

    features: dict[str, Tensor]
    """d loss / d features, for logits of scale 1: [n, D]."""
    vectors: dict[str, Tensor]
    """d loss / d numbers, and d loss / d terms of earlier sweeps: [n]."""


class Scalars(NamedTuple):
    """What a sweep's gradients add up to, float64."""

    bias: Tensor
    """Σ d loss / d logit of x against y."""
    scale: Tensor
    """d loss / d scale where terms use the scale themselves, besides the logits that it is in."""


@dataclass
class TiledBlock:
    """The logits of some samples against others, available tile by tile."""

    rows: Samples
    columns: Samples
    products: Mapping[Product, tuple[str, str]]
    """Each product's names among the rows' and the columns' features."""
    scale: Tensor
    """0-d, in the dtype that everything is computed in."""
    bias: Tensor | None
    backend: Backend
    cache_bytes: int
    """How much of the logits may be kept."""
    extra: Side | None = None
    """The side that is made of extra samples."""
    _cache: dict[tuple[int, int], dict[Product, Tensor]] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Sides whose terms are reduced here."""
        return tuple(side for side in SIDES if side != self.extra)

    def partials(self, layout: Layout, reduced: Reduced) -> dict[Side, Tensor]:
        """One sweep: its terms, reduced over this block: [n, K] for the x side and [m, K] for the y side."""
        lengths: dict[Side, int] = {"x": len(self.rows), "y": len(self.columns)}
        partials = {side: layout.nothing(side, lengths[side]) for side in self.sides}
        for rows, columns in self._tiles("statistics"):
            found = self.backend.partials(self._tile(rows, columns, reduced, keep=True), layout.sweep)
            for side, part in zip(SIDES, (rows, columns), strict=True):
                if side in partials:
                    own = partials[side][part]
                    partials[side][part] = layout.merge(side, (own, layout.join(side, found[side], len(own))))
        return partials

    def add_gradients(self, layout: Layout, pulls: Pulls, reduced: Reduced, into: Mapping[Side, Sums]) -> Scalars:
        """A sweep on the way back: add the gradients of the loss, given the finished terms of all rows and all columns."""
        bias, scale = (torch.zeros((), dtype=torch.float64, device=self.scale.device) for _ in range(2))
        for rows, columns in self._tiles("gradient"):
            parts: dict[Side, slice] = {"x": rows, "y": columns}
            tile = self._tile(rows, columns, reduced, keep=False)
            found = self.backend.gradients(tile, layout.sweep, {side: _cut(pulls[side], parts[side]) for side in self.sides})
            self._add_products(tile, found.products, parts, into)
            for name, (of_rows, of_columns) in found.vectors.items():
                for side, gradient in zip(SIDES, (of_rows, of_columns), strict=True):
                    if gradient is not None and name in into[side].vectors:
                        into[side].vectors[name][parts[side]] += gradient
            if self.bias is not None and MAIN in found.products:
                bias += found.products[MAIN].sum()
            if found.scale is not None:
                scale += found.scale
        return Scalars(bias, scale)

    def _add_products(
        self, tile: Tile, gradients: Mapping[Product, Tensor], parts: Mapping[Side, slice], into: Mapping[Side, Sums]
    ) -> None:
        for product, gradient in gradients.items():
            row_name, column_name = self.products[product]
            if row_name in into["x"].features:
                self.backend.add_product(into["x"].features[row_name][parts["x"]], gradient, tile.columns.features[column_name])
            if column_name in into["y"].features:
                self.backend.add_product(into["y"].features[column_name][parts["y"]], gradient.T, tile.rows.features[row_name])

    def _tiles(self, sweep: SweepKind) -> Iterator[tuple[slice, slice]]:
        height, width = self.backend.tile_shape(sweep)
        for row in range(0, len(self.rows), height):
            for column in range(0, len(self.columns), width):
                yield slice(row, min(row + height, len(self.rows))), slice(column, min(column + width, len(self.columns)))

    def _tile(self, rows: slice, columns: slice, reduced: Reduced, *, keep: bool) -> Tile:
        cut = self.rows.cut(rows), self.columns.cut(columns)
        place = (rows.start, columns.start)
        seen = {}
        if reduced and self.extra is None:
            seen = seen_by(
                *({name: vector[part] for name, vector in reduced[side].items()} for side, part in zip(SIDES, (rows, columns), strict=True))
            )
        return Tile(*cut, self.scale, self.bias, self.extra, block=partial(self._block, *cut, place, seen, keep))

    def _block(
        self, rows: Samples, columns: Samples, place: tuple[int, int], reduced: dict[str, tuple[Tensor, Tensor]], keep: bool
    ) -> Block:
        guide = same_text = None
        if rows.guide is not None and columns.guide is not None:
            guide = rows.guide @ columns.guide.T
        if rows.ids is not None and columns.ids is not None:
            same_text = rows.ids.unsqueeze(1) == columns.ids
        shared = rows.numbers.keys() & columns.numbers.keys()
        return Block(
            products=self._products(rows, columns, place, keep=keep),
            positive=self._positive(rows, columns),
            same_text=same_text,
            guide=guide,
            scale=self.scale,
            numbers={name: (rows.numbers[name].unsqueeze(1), columns.numbers[name].unsqueeze(0)) for name in shared},
            reduced=reduced,
            extra=self.extra,
        )

    def _products(self, rows: Samples, columns: Samples, place: tuple[int, int], *, keep: bool) -> dict[Product, Tensor]:
        if place in self._cache:
            return self._cache[place] if keep else self._cache.pop(place)
        dtype, products = self.scale.dtype, {}
        for product, (row_name, column_name) in self.products.items():
            logits = (rows.features[row_name].to(dtype) @ columns.features[column_name].to(dtype).T).mul_(self.scale)
            products[product] = logits if self.bias is None or product != MAIN else logits.add_(self.bias)
        size = sum(logits.nbytes for logits in products.values())
        if keep and size <= self.cache_bytes:
            self.cache_bytes -= size
            self._cache[place] = products
        return products

    def _positive(self, rows: Samples, columns: Samples) -> Tensor | None:
        if self.extra is not None or rows.index[-1] < columns.index[0] or columns.index[-1] < rows.index[0]:
            return None
        return (rows.index.unsqueeze(1) == columns.index).to(self.scale.device)


def _cut(pulls: Mapping[str, Pull], rows: slice) -> dict[str, Pull]:
    return {name: Pull(pull.total[rows], pull.share[rows]) for name, pull in pulls.items()}
