"""Backends: what computes a tile. Plain torch, the objective's terms by torch.compile, or fused Triton kernels.

Legend: the tile has n rows and m columns; D embedding width, k numbers that hold a partially reduced row of a term.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from clipscale.contrast.layout import HARDEST, SIDES, sweep_terms
from clipscale.objectives import MAIN, Block, Objective, Product, Pull, Side, Term

SweepKind = Literal["statistics", "gradient"]


@dataclass(frozen=True)
class Samples:
    """One side of a block or of a tile."""

    features: Mapping[str, Tensor]
    """By name: [n, D]."""
    index: Tensor
    """Number of each sample's pair in the global batch, ascending, on the CPU: [n]; −1 for extra samples, which are of no pair."""
    ids: Tensor | None = None
    """[n]."""
    guide: Tensor | None = None
    """Normalised guide features: [n, Dg]."""
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    """[n] each."""

    def __len__(self) -> int:
        return len(self.index)

    def may_share_pairs_with(self, other: Samples) -> bool:
        """Whether a pair may have one sample here and one there, told from the ends of both."""
        return bool(self.index[-1] >= other.index[0] and other.index[-1] >= self.index[0])

    def cut(self, rows: slice) -> Samples:
        """Some of the samples."""
        return Samples(
            {name: features[rows] for name, features in self.features.items()},
            self.index[rows],
            None if self.ids is None else self.ids[rows],
            None if self.guide is None else self.guide[rows],
            {name: numbers[rows] for name, numbers in self.numbers.items()},
        )


@dataclass(frozen=True)
class Tile:
    """A piece of a block."""

    rows: Samples
    columns: Samples
    products: Mapping[Product, tuple[str, str]]
    """Each product's names among the rows' and the columns' features."""
    scale: Tensor
    bias: Tensor | None
    extra: Side | None
    block: Callable[[], Block]
    """Its logits and all else, computed when asked for."""


class TileGradients(NamedTuple):
    """Gradients of the loss by what a tile is made of."""

    products: dict[Product, Tensor]
    """d loss / d logits: [n, m]."""
    vectors: dict[str, tuple[Tensor | None, Tensor | None]]
    """d loss / d numbers and terms of earlier sweeps, of the rows [n] and of the columns [m]."""
    scale: Tensor | None
    """d loss / d scale, besides the logits that it is in unless the backend `tells_scale`."""
    bias: Tensor | None
    """d loss / d bias; None when there is no bias, or it has no part in the tile's terms."""


class Backend:
    """Plain torch: the objective's own terms, and autograd through them."""

    tells_scale: ClassVar[bool] = False
    """Whether tiles tell all of d loss / d scale; if not, it is found from the features' gradients."""

    def __init__(self, objective: Objective, *, tile: tuple[int, int], vectors: frozenset[str]) -> None:
        self.objective, self.tile, self.vectors = objective, tile, vectors

    def tile_shape(self, sweep: SweepKind) -> tuple[int, int]:  # noqa: ARG002 - one shape for all sweeps
        """Rows and columns of the tiles this backend wants."""
        return self.tile

    def partials(self, tile: Tile, sweep: int) -> dict[Side, dict[str, Tensor]]:
        """The tile's rows and columns, partially reduced by the sweep's terms: by side and name, [n, k] and [m, k]."""
        found: dict[Side, dict[str, Tensor]] = {"x": {}, "y": {}}
        for name, parts in self._terms(sweep, tile.block()).items():
            for part in parts:
                for side, partial in zip(SIDES, part.partials(), strict=True):
                    if part.serves(side):
                        before = found[side].get(name)
                        found[side][name] = partial if before is None else part.merge(before, partial)
        return found

    def gradients(self, tile: Tile, sweep: int, pulls: Mapping[Side, Mapping[str, Pull]]) -> TileGradients:
        """Each term's pull on its values, carried through the objective's own formula by autograd."""
        block = _with_leaves(tile.block(), self.vectors)
        leaves = {"scale": block.scale, **({} if block.bias is None else {"bias": block.bias})}
        leaves |= {f"product {place}": logits for place, logits in enumerate(block.products.values())}
        vectors = {name: pair for name, pair in (*block.numbers.items(), *block.reduced.items()) if name in self.vectors}
        leaves |= {f"{side} {name}": vector for name, pair in vectors.items() for side, vector in zip(SIDES, pair, strict=True)}
        with torch.enable_grad():
            terms = self._terms(sweep, block)
            alive = {name: [part for part in parts if part.filled.requires_grad] for name, parts in terms.items()}
        values, gradients = _pulled(alive, pulls)
        if not values:
            return TileGradients({}, {}, None, None)
        found = dict(zip(leaves, torch.autograd.grad(values, list(leaves.values()), gradients, allow_unused=True), strict=True))
        products = {product: found[f"product {place}"] for place, product in enumerate(block.products)}
        main = products.get(MAIN)
        return TileGradients(
            {product: gradient for product, gradient in products.items() if gradient is not None},
            {name: (_flat(found[f"x {name}"]), _flat(found[f"y {name}"])) for name in vectors},
            found["scale"],
            None if tile.bias is None else _sum_of(main, found.get("bias")),
        )

    def partials_and_gradients(
        self, tile: Tile, sweep: int, pulls: Mapping[Side, Mapping[str, Pull]]
    ) -> tuple[dict[Side, dict[str, Tensor]], TileGradients]:
        """Both, from logits that are computed once: for objectives whose pulls are known before any term is."""
        block = tile.block()
        tile = replace(tile, block=lambda: block)
        return self.partials(tile, sweep), self.gradients(tile, sweep, pulls)

    def add_product(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """into += left · right: [n, D], [n, m], [m, D]."""
        into.addmm_(left, right.to(left.dtype))

    def _terms(self, sweep: int, block: Block) -> dict[str, tuple[Term, ...]]:
        return sweep_terms(self.objective, sweep, block)


class CompiledBackend(Backend):
    """The objective's terms by torch.compile: what they do to each entry becomes one pass over the tile."""

    def _terms(self, sweep: int, block: Block) -> dict[str, tuple[Term, ...]]:
        terms = super()._terms(sweep, _empty(block))  # of no entries: only to know which there are
        filled = iter(_compiled_values(self.objective, sweep)(block))
        return {name: tuple(part.over(next(filled)) for part in parts) for name, parts in terms.items()}


def _empty(block: Block) -> Block:
    def cut(named: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (rows[:0], columns[:, :0]) for name, (rows, columns) in named.items()}

    def cut_matrix(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix[:0, :0]

    return replace(
        block,
        products={product: logits[:0, :0] for product, logits in block.products.items()},
        numbers=cut(block.numbers),
        reduced=cut(block.reduced),
        positive=cut_matrix(block.positive),
        same_text=cut_matrix(block.same_text),
        guide=cut_matrix(block.guide),
    )


@functools.cache
def _compiled_values(objective: Objective, sweep: int) -> Callable[[Block], list[Tensor]]:
    def values(block: Block) -> list[Tensor]:
        return [part.filled for parts in sweep_terms(objective, sweep, block).values() for part in parts]

    values.__code__ = values.__code__.replace()  # torch counts recompilations by code object: each objective gets its own
    compiled: Callable[[Block], list[Tensor]] = torch.compile(values, dynamic=True)
    return compiled


def _with_leaves(block: Block, vectors: frozenset[str]) -> Block:
    """The same block, made of leaves of a new graph."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    def pairs(named: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (leaf(row), leaf(column)) if name in vectors else (row, column) for name, (row, column) in named.items()}

    return replace(
        block,
        products={product: leaf(logits) for product, logits in block.products.items()},
        scale=leaf(block.scale),
        bias=None if block.bias is None else leaf(block.bias),
        numbers=pairs(block.numbers),
        reduced=pairs(block.reduced),
    )


def _pulled(terms: Mapping[str, Sequence[Term]], pulls: Mapping[Side, Mapping[str, Pull]]) -> tuple[list[Tensor], list[Tensor]]:
    """Values that depend on a leaf, and d loss / d each of them."""
    values, gradients = [], []
    for name, parts in terms.items():
        for part in parts:
            rows, columns = (pulls[side].get(name) if side in pulls and part.serves(side) else None for side in SIDES)
            if name != HARDEST and (rows or columns):
                values.append(part.filled)
                gradients.append(part.pull(rows, columns))
    return values, gradients


def _sum_of(logits: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """d loss / d bias: through the logits it was added to, and where the terms use it itself."""
    parts = [part.sum() for part in (logits, bias) if part is not None]
    return torch.stack(parts).sum() if parts else None


def _flat(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.flatten()
