"""Multi-view objectives: what the views of a pair are called, and how their own logits and negatives come together."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from clipscale.objectives import LogSumExp, Product, Row, View


def view_names(count: int) -> tuple[View, ...]:
    """x, y, z, then view_4 and so on."""
    return ("x", "y", "z", *(f"view_{number}" for number in range(4, count + 1)))[:count]


def across(views: tuple[View, ...]) -> list[Product]:
    """Each view with each other view, once."""
    return list(itertools.combinations(views, 2))


def within(views: tuple[View, ...]) -> list[Product]:
    """Each view with itself."""
    return [(view, view) for view in views]


def own_logits(row: Row, *, ordered: bool) -> Tensor:
    """log Σ e^logit over the pairs of different views of one and the same sample; ordered pairs count twice: [n]."""
    logits = torch.stack([row.pairs[pair] for pair in across_of(row)], dim=1)
    return logits.logsumexp(1) + (math.log(2) if ordered else 0.0)


def across_of(row: Row) -> list[Product]:
    """Pairs of different views that the row knows."""
    return [pair for pair in row.pairs if pair[0] != pair[1]]


def log_add(*terms: Tensor) -> Tensor:
    """log Σ e^term, −∞ and without a gradient where all are −∞: [n] each."""
    return LogSumExp(torch.stack(terms, dim=1)).reduce(1)
