"""Layout: the sweeps of an objective, the terms each reduces, and where their numbers stand in a partially reduced row.

Legend: n rows of a side, K numbers that hold a partially reduced row, k of them for one term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from clipscale.objectives import MAIN, Block, Max, Objective, Side, Term, Terms

SIDES: tuple[Side, Side] = ("x", "y")
HARDEST = "hardest negative"
"""The engine's own term, for the metrics: the largest logit among combinations of different captions."""


def sides_of(extra: Side | None) -> tuple[Side, ...]:
    """Sides whose terms a block reduces: not the one that is made of extra samples."""
    return tuple(side for side in SIDES if side != extra)


class Peak(Max):
    """The largest value, to look at: no gradient, so nobody counts how often it occurs."""

    width = 1

    def _partial(self, dim: int) -> Tensor:
        return self.filled.amax(dim).unsqueeze(1)

    @classmethod
    def nothing(cls, rows: int, like: Tensor) -> Tensor:
        return like.new_full((rows, 1), cls.fill)

    @classmethod
    def merge(cls, one: Tensor, other: Tensor) -> Tensor:
        return torch.maximum(one, other)


def numbers_of(objective: Objective) -> tuple[str, ...]:
    """Names of every number that blocks show: those the caller gives, then those derived from the pairs' embeddings."""
    return (*objective.numbers, *objective.derived_numbers(dict.fromkeys(objective.views, torch.zeros(0, 1))))


def as_parts(terms: Terms) -> dict[str, tuple[Term, ...]]:
    """Terms by name, each name's as a tuple."""
    return {name: (term,) if isinstance(term, Term) else tuple(term) for name, term in terms.items()}


def sweep_terms(objective: Objective, sweep: int, block: Block) -> dict[str, tuple[Term, ...]]:
    """The terms of one of the objective's sweeps; those of the first with the engine's own among them."""
    if sweep:
        return as_parts(objective.later_sweeps()[sweep - 1](block))
    parts = as_parts(objective.terms(block))
    if MAIN in block.products and block.extra is None:
        parts[HARDEST] = (Peak(block.logits.detach(), block.left_out("ignored")),)
    return parts


class Layout:
    """Where each term's numbers stand in the partial rows [n, K] of a side, for one sweep; learnt from the terms of an empty block."""

    def __init__(self, objective: Objective, sweep: int, *, like: Tensor, earlier: Iterable[str]) -> None:
        def nothing() -> Tensor:
            return like.new_zeros(0, 0).requires_grad_()

        mask = torch.zeros(0, 0, dtype=torch.bool, device=like.device)
        pair = (like.new_zeros(0, 1), like.new_zeros(1, 0))
        block = Block(
            products={product: nothing() for product in objective.products},
            positive=mask,
            same_text=mask,
            guide=nothing().detach(),
            scale=like.new_ones(()),
            bias=like.new_zeros(()) if "bias" in objective.needs else None,
            numbers=dict.fromkeys(numbers_of(objective), pair),
            reduced=dict.fromkeys(earlier, pair),
        )
        with torch.enable_grad():
            parts = sweep_terms(objective, sweep, block)
            self.has_gradient = any(part.filled.requires_grad for same in parts.values() for part in same)
        self.terms: dict[Side, dict[str, type[Term]]] = {
            side: {name: type(same[0]) for name, same in parts.items() if any(part.serves(side) for part in same)} for side in SIDES
        }
        self.sweep, self.like = sweep, like

    def names(self, side: Side) -> list[str]:
        """The objective's own terms of a side."""
        return [name for name in self.terms[side] if name != HARDEST]

    def width(self, side: Side) -> int:
        """K."""
        return sum(term.width for term in self.terms[side].values())

    def split(self, side: Side, partial: Tensor) -> dict[str, Tensor]:
        """Partial rows by term: [n, K] -> each [n, k]."""
        widths = [term.width for term in self.terms[side].values()]
        return dict(zip(self.terms[side], torch.split(partial, widths, dim=1), strict=True))

    def nothing(self, side: Side, rows: int) -> Tensor:
        """Rows into which nothing has been reduced yet: [rows, K]."""
        return self.join(side, {}, rows)

    def join(self, side: Side, found: Mapping[str, Tensor], rows: int) -> Tensor:
        """Partially reduced terms, those that are missing as nothing: each [rows, k] -> [rows, K]."""
        terms = self.terms[side].items()
        columns = [found[name] if name in found else term.nothing(rows, self.like) for name, term in terms]
        return torch.cat(columns, dim=1) if columns else self.like.new_zeros(rows, 0)

    def merge(self, side: Side, partials: Sequence[Tensor] | Tensor) -> Tensor:
        """Partial reductions of the same rows as one, in their order: each [n, K] -> [n, K]."""
        merged = partials[0]
        for partial in partials[1:] if self.terms[side] else ():
            one, other = self.split(side, merged), self.split(side, partial)
            merged = torch.cat([term.merge(one[name], other[name]) for name, term in self.terms[side].items()], dim=1)
        return merged

    def totals(self, side: Side, partial: Tensor) -> dict[str, Tensor]:
        """Finished terms: [n, K] -> each [n]."""
        split = self.split(side, partial)
        return {name: term.total(split[name]) for name, term in self.terms[side].items()}


def layouts_of(objective: Objective, *, like: Tensor) -> list[Layout]:
    """One layout for each of the objective's sweeps."""
    layouts = [Layout(objective, 0, like=like, earlier=())]
    for sweep in range(1, 1 + len(objective.later_sweeps())):
        layouts.append(Layout(objective, sweep, like=like, earlier=reduced_before(layouts)))
    return layouts


def reduced_before(layouts: Sequence[Layout]) -> list[str]:
    """Names of all terms that these sweeps reduce."""
    return sorted({name for layout in layouts for side in SIDES for name in layout.names(side)})


def seen_by(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Terms of earlier sweeps as a block shows them, not a number for a side that a term does not serve: [n], [m] -> [n, 1], [1, m]."""
    seen = {}
    for name in rows.keys() | columns.keys():
        known = rows[name] if name in rows else columns[name]
        row, column = (side.get(name, known.new_full((1,), torch.nan)) for side in (rows, columns))
        seen[name] = row.unsqueeze(1), column.unsqueeze(0)
    return seen
