"""What an objective is written in: a block of logits, terms to reduce over the other side, and the reduced row.

A block holds the logits of some pairs (its rows) against some pairs (its columns): of the rows' x against the columns' y, and of other
views if an objective asks. It serves both directions: each term is reduced along the rows, for the x side, and along the columns, for
the y side. The mathematics of every reduction
stands here once: in textbook form (`reduce`), and piecewise (`partials`, `merge`, `total`, `pull`) for engines that never hold
more than a tile.

Legend: n rows and m columns in a block, b pairs on this rank, B in the global batch, D embedding width, k numbers in a partial.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Side = Literal["x", "y"]
SameText = Literal["negative", "ignored"]


def softplus(value: Tensor) -> Tensor:
    """log(1 + e^value) to full relative precision at both ends, unlike torch's softplus, which cuts off at 20."""
    return -functional.logsigmoid(-value)


View = str
"""A kind of features that every pair has: "x", "y", and further modalities by the names the batch gives them."""
Product = tuple[View, View]
"""Logits of one view of the row's pairs against one view of the column's pairs."""
MAIN: Product = ("x", "y")


@dataclass(frozen=True)
class Block:
    """Logits of n pairs (rows) against m pairs (columns), and what else is known about each of their n·m combinations."""

    products: Mapping[Product, Tensor]
    """By views: scale · ⟨row's view, column's view⟩, for ("x", "y") plus the bias where the objective needs one: each [n, m]."""
    positive: Tensor | None
    """True where row and column are the same pair: [n, m]; None when no pair lies in this block."""
    same_text: Tensor | None
    """True where the captions of row and column are equal, pairs included: [n, m]; None when captions are not known."""
    guide: Tensor | None
    """Cosine of the two pairs' guide features: [n, m]; None unless the objective needs it."""
    scale: Tensor
    """What the cosines were multiplied with: 0-d."""
    bias: Tensor | None = None
    """What was added to the logits of x against y: 0-d; None when the objective needs no bias."""
    numbers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What `Objective.numbers` names and what `Objective.derived_numbers` gives, of the rows [n, 1] and of the columns [1, m]."""
    reduced: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Terms that earlier sweeps have reduced over the whole other side: of the rows [n, 1] and of the columns [1, m]."""
    extra: Side | None = None
    """The side that is not made of pairs here: with "y", columns are extra y samples, the rows' negatives; with "x", rows are extra x
    samples. `logits` are theirs, terms are reduced for the other side only, and nothing but `logits` and `scale` is known."""

    @property
    def logits(self) -> Tensor:
        """Of x against y: [n, m]."""
        return self.products[MAIN]

    def left_out(self, same_text: SameText = "negative") -> Tensor | None:
        """True where an entry is no negative: the pairs, and with "ignored" also combinations of equal captions."""
        if same_text == "negative" or self.same_text is None:
            return self.positive
        return self.same_text if self.positive is None else self.same_text | self.positive


@dataclass(frozen=True)
class Own:
    """What this rank knows of its own b pairs, for statistics of the global batch."""

    views: Mapping[View, Tensor]
    """[b, D] each."""
    pairs: Mapping[Product, Tensor]
    """Logits of each pair with itself, by views: [b]."""
    scale: Tensor
    """0-d."""
    numbers: Mapping[str, Tensor]
    """[b] each."""
    bias: Tensor | None = None
    """0-d."""


@dataclass(frozen=True)
class Row:
    """The pairs that a rank owns, seen from one side: each with its own logit and its terms reduced over the whole other side."""

    side: Side
    pairs: Mapping[Product, Tensor]
    """Logits of each pair's views with each other, by views: [n]."""
    count: int
    """B, pairs in the global batch."""
    reduced: Mapping[str, Tensor]
    scale: Tensor
    """What the cosines were multiplied with: 0-d."""
    statistics: Mapping[str, Tensor]
    """`Objective.statistics` and `Objective.row_sums`, added over the global batch."""
    numbers: Mapping[str, Tensor]
    """What `Objective.numbers` names and what `Objective.derived_numbers` gives: [n]."""
    bias: Tensor | None = None
    """What was added to the logits of x with y: 0-d."""

    @property
    def positive(self) -> Tensor:
        """Logit of each pair, x with y: [n]."""
        return self.pairs[MAIN]

    def __getitem__(self, name: str) -> Tensor:
        """The reduced term of this name: [n]."""
        return self.reduced[name]


class Pull(NamedTuple):
    """What a side's reduced term asks of its entries in the backward pass."""

    total: Tensor
    """The term over the whole other side: [n]."""
    share: Tensor
    """d loss / d term, prepared by `Term.share`: [n]."""


@dataclass(frozen=True)
class Term(ABC):
    """Values for every entry of a block, to be reduced over the other side."""

    values: Tensor
    """[n, m]."""
    without: Tensor | None = None
    """True where an entry takes no part: [n, m]."""
    side: Side | None = None
    """The only side that needs this term; none: both."""

    width: ClassVar[int]
    """k: numbers that hold a partially reduced row."""
    fill: ClassVar[float]
    """The value that takes no part in the reduction; also the reduction of nothing."""

    @cached_property
    def filled(self) -> Tensor:
        """The values, with entries that take no part filled in."""
        return self.values if self.without is None else self.values.masked_fill(self.without, self.fill)

    def over(self, filled: Tensor) -> Term:
        """The same reduction, over values that are filled in already."""
        return type(self)(filled, side=self.side)

    def serves(self, side: Side) -> bool:
        """Whether this term is reduced for that side."""
        return self.side in (None, side)

    @abstractmethod
    def reduce(self, dim: int) -> Tensor:
        """The reduction over a whole dimension, differentiable, in torch's own words: [n, m] -> [n] or [m]."""

    @abstractmethod
    def partials(self) -> tuple[Tensor, Tensor]:
        """This block's rows and columns, partially reduced: [n, k] and [m, k]."""

    @classmethod
    @abstractmethod
    def nothing(cls, rows: int, like: Tensor) -> Tensor:
        """Rows into which no entry has been reduced yet: [rows, k]."""

    @classmethod
    @abstractmethod
    def merge(cls, one: Tensor, other: Tensor) -> Tensor:
        """Two partial reductions of the same rows as one: [n, k]."""

    @classmethod
    @abstractmethod
    def total(cls, partial: Tensor) -> Tensor:
        """The finished term: [n, k] -> [n]."""

    @classmethod
    def share(cls, partial: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG003 - only Max looks at the partial
        """What each entry is to multiply its own derivative with: [n]."""
        return gradient

    def pull(self, rows: Pull | None, columns: Pull | None) -> Tensor:
        """d loss / d filled values, from the finished rows' and columns' totals and shares: [n, m]."""
        gradient = torch.zeros_like(self.filled)
        if rows is not None:
            gradient += self.spread(rows.total.unsqueeze(1), rows.share.unsqueeze(1))
        if columns is not None:
            gradient += self.spread(columns.total, columns.share)
        return gradient

    @abstractmethod
    def spread(self, total: Tensor, share: Tensor) -> Tensor:
        """One side's part of `pull`; total and share are [n, 1] or [m], the result broadcasts to [n, m]."""


class Sum(Term):
    """Σ of the values."""

    width = 1
    fill = 0.0

    def reduce(self, dim: int) -> Tensor:
        return self.filled.sum(dim)

    def partials(self) -> tuple[Tensor, Tensor]:
        return self.filled.sum(1, keepdim=True), self.filled.sum(0).unsqueeze(1)

    @classmethod
    def nothing(cls, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, 1)

    @classmethod
    def merge(cls, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    @classmethod
    def total(cls, partial: Tensor) -> Tensor:
        return partial[:, 0]

    def spread(self, total: Tensor, share: Tensor) -> Tensor:  # noqa: ARG002 - a sum's derivative is 1 everywhere
        return share


class SoftplusSum(Sum):
    """Σ log(1 + e^value): a Sum whose values are logits, so that fused kernels know it."""

    @cached_property
    def filled(self) -> Tensor:
        values = softplus(self.values)
        return values if self.without is None else values.masked_fill(self.without, self.fill)

    def over(self, filled: Tensor) -> Term:
        return Sum(filled, side=self.side)


class Max(Term):
    """The largest value; equal ones share its gradient evenly."""

    width = 2  # the largest value, and how often it occurs
    fill = -torch.inf

    def reduce(self, dim: int) -> Tensor:
        return self.filled.amax(dim)

    def partials(self) -> tuple[Tensor, Tensor]:
        return self._partial(1), self._partial(0)

    def _partial(self, dim: int) -> Tensor:
        largest = self.filled.amax(dim, keepdim=True)
        return torch.stack((largest.squeeze(dim), (self.filled == largest).sum(dim).to(largest.dtype)), dim=1)

    @classmethod
    def nothing(cls, rows: int, like: Tensor) -> Tensor:
        return like.new_tensor([cls.fill, 0.0]).expand(rows, 2)

    @classmethod
    def merge(cls, one: Tensor, other: Tensor) -> Tensor:
        largest = torch.maximum(one[:, 0], other[:, 0])
        count = one[:, 1] * (one[:, 0] == largest) + other[:, 1] * (other[:, 0] == largest)
        return torch.stack((largest, count), dim=1)

    @classmethod
    def total(cls, partial: Tensor) -> Tensor:
        return partial[:, 0]

    @classmethod
    def share(cls, partial: Tensor, gradient: Tensor) -> Tensor:
        return gradient / partial[:, 1].clamp(min=1)

    def spread(self, total: Tensor, share: Tensor) -> Tensor:
        return (self.filled == total) * share


class LogSumExp(Term):
    """log Σ e^value, never over- or underflowing; −∞ over nothing.

    A block is taken to the exponential once, for both directions, relative to its largest value. Rows or columns that lie so far
    below it that this would cost digits are detected, and the block is then done again with an offset of their own.
    """

    width = 2  # an offset, and Σ e^(value − offset)
    fill = -torch.inf
    faint: ClassVar[float] = 1e-20
    """Sums below this are done again: far from the smallest float32 (1e-38), so that every kept digit is right."""

    def reduce(self, dim: int) -> Tensor:
        empty = (self.filled == self.fill).all(dim)  # torch's gradient of a logsumexp over nothing is not a number
        return self.filled.masked_fill(empty.unsqueeze(dim), 0).logsumexp(dim).masked_fill(empty, self.fill)

    def partials(self) -> tuple[Tensor, Tensor]:
        offset = _finite(self.filled.amax())
        exponentials = (self.filled - offset).exp_()
        row_sums, column_sums = exponentials.sum(1), exponentials.sum(0)
        if torch.minimum(row_sums.amin(), column_sums.amin()) < self.faint:
            return self._partial(1), self._partial(0)
        return torch.stack((offset.expand_as(row_sums), row_sums), 1), torch.stack((offset.expand_as(column_sums), column_sums), 1)

    def _partial(self, dim: int) -> Tensor:
        offset = _finite(self.filled.amax(dim, keepdim=True))
        return torch.stack((offset.squeeze(dim), (self.filled - offset).exp_().sum(dim)), dim=1)

    @classmethod
    def nothing(cls, rows: int, like: Tensor) -> Tensor:
        return like.new_tensor([cls.fill, 0.0]).expand(rows, 2)

    @classmethod
    def merge(cls, one: Tensor, other: Tensor) -> Tensor:
        offset = torch.maximum(one[:, 0], other[:, 0])
        base = _finite(offset)
        return torch.stack((offset, one[:, 1] * (one[:, 0] - base).exp() + other[:, 1] * (other[:, 0] - base).exp()), dim=1)

    @classmethod
    def total(cls, partial: Tensor) -> Tensor:
        return partial[:, 0] + partial[:, 1].log()

    def pull(self, rows: Pull | None, columns: Pull | None) -> Tensor:
        offset = _finite(self.filled.amax())
        row_factor = _factor(offset, rows).unsqueeze(1)
        column_factor = _factor(offset, columns)
        if max(row_factor.amax(), column_factor.amax()) > 1 / self.faint:
            return super().pull(rows, columns)
        row_share = row_factor * rows.share.unsqueeze(1) if rows else row_factor
        column_share = column_factor * columns.share if columns else column_factor
        return (self.filled - offset).exp_().mul_(row_share + column_share)

    def spread(self, total: Tensor, share: Tensor) -> Tensor:
        return (self.filled - _finite(total)).exp_() * share


def _factor(offset: Tensor, side: Pull | None) -> Tensor:
    """e^(offset − total), with which exponentials relative to the offset become softmax weights; 0 for a side without a share."""
    return (offset - side.total).exp() if side else offset.new_zeros(1)


def _finite(offset: Tensor) -> Tensor:
    """An offset that can be subtracted: 0 where there is nothing to offset, since −∞ − −∞ is not a number."""
    return offset.masked_fill(offset == -torch.inf, 0)
