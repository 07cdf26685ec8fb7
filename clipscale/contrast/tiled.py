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

from torch import Tensor

from clipscale.contrast.backends import Backend, Samples, SweepKind, Tile, TileGradients
from clipscale.contrast.layout import SIDES, Layout, seen_by, sides_of
from clipscale.objectives import MAIN, Block, Product, Pull, Side

Reduced = Mapping[Side, Mapping[str, Tensor]]
"""Terms of earlier sweeps, finished, of a block's rows and of its columns: [n] and [m]."""
Pulls = Mapping[Side, Mapping[str, Pull]]
Parts = dict[Side, slice]
"""Where a tile lies in its block."""


@dataclass
class Sums:
    """Where the gradients of one side of a block are added up; names that are absent are not wanted."""

    features: dict[str, Tensor]
    """d loss / d features, for logits of scale 1: [n, D]."""
    vectors: dict[str, Tensor]
    """d loss / d numbers, and d loss / d terms of earlier sweeps: [n]."""


@dataclass
class Into:
    """Where all gradients of a block are added up."""

    sides: Mapping[Side, Sums]
    bias: Tensor
    """d loss / d bias: float64."""
    scale: Tensor
    """d loss / d scale, as far as the backend's tiles tell it: float64."""


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

    def partials(self, layout: Layout, reduced: Reduced) -> dict[Side, Tensor]:
        """One sweep: its terms, reduced over this block: [n, K] for the x side and [m, K] for the y side."""
        partials = self._nothing(layout)
        for parts in self._tiles("statistics"):
            found = self.backend.partials(self._tile(parts, reduced, keep=True), layout.sweep)
            self._merge(layout, found, parts, partials)
        return partials

    def add_gradients(self, layout: Layout, pulls: Pulls, reduced: Reduced, into: Into) -> None:
        """A sweep on the way back: add the gradients of the loss, given the finished terms of all rows and all columns."""
        for parts in self._tiles("gradient"):
            tile = self._tile(parts, reduced, keep=False)
            self._add(self.backend.gradients(tile, layout.sweep, self._cut(pulls, parts)), tile, parts, into)

    def partials_and_gradients(self, layout: Layout, pulls: Pulls, into: Into) -> dict[Side, Tensor]:
        """Both in one sweep, for objectives whose pulls are known before any term is."""
        partials = self._nothing(layout)
        for parts in self._tiles("gradient"):
            tile = self._tile(parts, {}, keep=False)
            reduced, found = self.backend.partials_and_gradients(tile, layout.sweep, self._cut(pulls, parts))
            self._merge(layout, reduced, parts, partials)
            self._add(found, tile, parts, into)
        return partials

    def _nothing(self, layout: Layout) -> dict[Side, Tensor]:
        lengths: dict[Side, int] = {"x": len(self.rows), "y": len(self.columns)}
        return {side: layout.nothing(side, lengths[side]) for side in sides_of(self.extra)}

    def _merge(self, layout: Layout, found: Mapping[Side, Mapping[str, Tensor]], parts: Parts, into: dict[Side, Tensor]) -> None:
        for side, rows in into.items():
            own = rows[parts[side]]
            rows[parts[side]] = layout.merge(side, (own, layout.join(side, found[side], len(own))))

    def _cut(self, pulls: Pulls, parts: Parts) -> dict[Side, dict[str, Pull]]:
        return {
            side: {name: Pull(pull.total[parts[side]], pull.share[parts[side]]) for name, pull in pulls[side].items()}
            for side in sides_of(self.extra)
        }

    def _add(self, found: TileGradients, tile: Tile, parts: Parts, into: Into) -> None:
        self._add_products(found.products, tile, parts, into)
        for name, gradients in found.vectors.items():
            for side, gradient in zip(SIDES, gradients, strict=True):
                if gradient is not None and name in into.sides[side].vectors:
                    into.sides[side].vectors[name][parts[side]] += gradient
        if found.bias is not None:
            into.bias += found.bias
        if found.scale is not None:
            into.scale += found.scale

    def _add_products(self, gradients: Mapping[Product, Tensor], tile: Tile, parts: Parts, all_sides: Into) -> None:
        into = all_sides.sides
        for product, gradient in gradients.items():
            row_name, column_name = self.products[product]
            if row_name in into["x"].features:
                self.backend.add_product(into["x"].features[row_name][parts["x"]], gradient, tile.columns.features[column_name])
            if column_name in into["y"].features:
                self.backend.add_product(into["y"].features[column_name][parts["y"]], gradient.T, tile.rows.features[row_name])

    def _tiles(self, sweep: SweepKind) -> Iterator[Parts]:
        height, width = self.backend.tile_shape(sweep)
        for row in range(0, len(self.rows), height):
            for column in range(0, len(self.columns), width):
                yield {
                    "x": slice(row, min(row + height, len(self.rows))),
                    "y": slice(column, min(column + width, len(self.columns))),
                }

    def _tile(self, parts: Parts, reduced: Reduced, *, keep: bool) -> Tile:
        cut = self.rows.cut(parts["x"]), self.columns.cut(parts["y"])
        place = (parts["x"].start, parts["y"].start)
        seen = {}
        if reduced and self.extra is None:
            seen = seen_by(*({name: vector[parts[side]] for name, vector in reduced[side].items()} for side in SIDES))
        return Tile(*cut, self.products, self.scale, self.bias, self.extra, block=partial(self._block, *cut, place, seen, keep))

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
            positive=(rows.index.unsqueeze(1) == columns.index).to(self.scale.device) if rows.may_share_pairs_with(columns) else None,
            same_text=same_text,
            guide=guide,
            scale=self.scale,
            bias=self.bias,
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
