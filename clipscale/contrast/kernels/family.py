"""Family: which objectives the fused kernels know, found by looking at the terms themselves.

The kernels reduce the logits of x against y by log-sum-exp, by Σ softplus, by Σ and by counting, all over the same entries: every
combination, all but the pairs, or all but combinations of equal captions. That is clip with all its settings, dcl, dclw, siglip, and
any objective of somebody else's that states such terms. No objective is known by name: its terms are asked for on a small block
whose entries tell the cases apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipscale.contrast.layout import HARDEST, numbers_of, sweep_terms
from clipscale.objectives import MAIN, Block, LogSumExp, Objective, Side, SoftplusSum, Sum, Term

Reduction = Literal["logsumexp", "softplus", "sum", "count"]
"""What the kernels can reduce, in the order in which they write it down."""
LeftOut = Literal["nothing", "pairs", "equal captions"]
"""Entries that take no part; "equal captions" has the pairs among them."""


@dataclass(frozen=True)
class Family:
    """An objective's terms on blocks of one sort, as the kernels see them."""

    names: Mapping[Reduction, str]
    """What the objective calls each reduction; absent ones are not made."""
    left_out: LeftOut
    hardest: bool
    """Whether the metrics' term, the largest logit of another caption, is wanted too."""


@functools.cache
def family_of(objective: Objective, *, extra: Side | None, captions: bool) -> Family | None:
    """How the kernels see the objective's blocks; None when its terms are others than theirs.

    Args:
        objective: what is computed.
        extra: the side of a block that is made of extra samples, if one is.
        captions: whether blocks know which captions are equal.
    """
    if objective.products != (MAIN,) or objective.later_sweeps():
        return None
    block = _probe(objective, extra=extra, captions=captions)
    terms = sweep_terms(objective, 0, block)
    hardest = terms.pop(HARDEST, None) is not None
    parts = {name: same[0] for name, same in terms.items() if len(same) == 1}
    named = {_reduction(part, block): name for name, part in parts.items()}
    cases = {_left_out(part.without, block) for part in parts.values()}
    if None in named or None in cases or not len(terms) == len(parts) == len(named) or len(cases) != 1:
        return None
    names = {reduction: name for reduction, name in named.items() if reduction is not None}
    return Family(names, next(case for case in cases if case is not None), hardest)


def knows(objective: Objective, *, extras: frozenset[Side], captions: bool) -> bool:
    """Whether all of a call's blocks are the kernels'."""
    return all(family_of(objective, extra=extra, captions=captions) is not None for extra in (None, *sorted(extras)))


def _probe(objective: Objective, *, extra: Side | None, captions: bool) -> Block:
    """A block in which pairs, equal captions and other combinations all occur, and no two entries are alike."""
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    positive = torch.zeros(6, 8, dtype=torch.bool)
    positive[range(4), range(4)] = True
    same = positive.clone()
    same[0, 5] = same[4, 1] = same[5, 7] = True
    guide = numbers(6, 8) if {"guide", "first_guide"} & objective.needs else None
    return Block(
        products={MAIN: numbers(6, 8).requires_grad_()},
        positive=None if extra else positive,
        same_text=same if captions and not extra else None,
        guide=None if extra else guide,
        scale=torch.tensor(3.7),
        bias=torch.tensor(-1.3) if "bias" in objective.needs else None,
        numbers={} if extra else {name: (numbers(6, 1), numbers(1, 8)) for name in numbers_of(objective)},
        extra=extra,
    )


def _reduction(term: Term, block: Block) -> Reduction | None:
    if term.side is not None:
        return None
    if term.values is block.logits:
        kinds: dict[type[Term], Reduction] = {LogSumExp: "logsumexp", SoftplusSum: "softplus", Sum: "sum"}
        return kinds.get(type(term))
    constant = type(term) is Sum and not term.values.requires_grad and bool((term.values == 1).all())
    return "count" if constant else None


def _left_out(without: Tensor | None, block: Block) -> LeftOut | None:
    """Which case a mask is, told by comparing it with each."""
    cases: dict[LeftOut, Tensor | None] = {
        "nothing": None,
        "pairs": block.left_out("negative"),
        "equal captions": block.left_out("ignored"),
    }
    for case, mask in cases.items():
        if without is mask or (without is not None and mask is not None and torch.equal(without, mask)):
            return case
    return None
