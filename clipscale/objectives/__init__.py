"""Objectives: what is summed over the other side, and what a sample then loses. Nothing here knows of ranks, tiles or engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import ModelWrapValidatorHandler, model_validator
from torch import Tensor

from clipscale.objectives._terms import (
    MAIN,
    Block,
    LogSumExp,
    Max,
    Own,
    Product,
    Pull,
    Row,
    SameText,
    Side,
    SoftplusSum,
    Sum,
    Term,
    View,
    softplus,
)
from clipscale.settings import Part

Need = Literal["bias", "guide", "first_guide", "ids"]
Terms = Mapping[str, Term | Sequence[Term]]
"""By name; several terms of one name and kind are reduced into one number."""


class Objective(Part, ABC):
    """A contrastive loss, stated by the terms it reduces and the loss of a row.

    The loss of a global batch of B pairs is `Σ pair_loss / B` (+ `batch_loss`), where a pair's loss is by default that of its row on the x
    side plus that on the y side. The contrast engine calls `terms` on blocks of any size, reduces each term over the whole other side,
    calls `row_loss` on the results, and gets all gradients by itself; a pair's own logit reaches `row_loss` as `row.positive`, so that
    terms can leave it out and keep their precision on fitted pairs.

    Most objectives define `terms` and `row_loss`, and nothing else. Several are added up by configuration:
    `{name: clip, add: [{name: uniformity, weight: 0.5}]}`.
    """

    folder: ClassVar[str] = "clipscale.objectives"
    init_bias: ClassVar[float | None] = None
    """Where a learned logit bias starts; none: this objective uses no bias."""
    one_sweep: ClassVar[bool] = False
    """Whether every term is a sum that the loss takes linearly: what each entry is worth is then known before any term is, and the sweep
    that reduces the terms gives the gradients too, in three matrix products instead of four."""
    takes_extras: ClassVar[bool] = False
    """Whether blocks may hold extra samples of one side, negatives of everybody: hard-negative captions, a queue."""

    @property
    def needs(self) -> frozenset[Need]:
        """What must be given besides embeddings and scale.

        `bias`: a learned logit bias. `guide`: features of the second modality's locked tower; `first_guide`: of the first's. `ids`: the
        captions' identities.
        """
        return frozenset()

    @property
    def views(self) -> tuple[View, ...]:
        """Embeddings that every pair must have, "x" and "y" first."""
        return MAIN

    @property
    def products(self) -> tuple[Product, ...]:
        """Which views of the rows meet which views of the columns in a block; each is one matrix product more in every tile."""
        return (MAIN,)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of numbers that every pair must bring along: labels, weights, temperatures of its own."""
        return ()

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002 - most objectives have none
        """Further numbers of every pair, from its own embeddings ([b, D] each): [b] each, shown in blocks and rows like any other number.

        Gradients flow through them. Each may depend on its own pair alone; names must not depend on the values.
        """
        return {}

    @property
    def groups(self) -> int:
        """Into how many groups the global batch is cut, each with negatives of its own alone; the loss is their mean."""
        return 1

    @property
    def centres_guide(self) -> bool:
        """Whether the global batch's mean is taken off the guide features before their cosines."""
        return False

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one adds up; only itself unless it is a composition."""
        return (self,)

    @abstractmethod
    def terms(self, block: Block) -> Terms:
        """Named terms for every entry of a block; the same names, kinds and sides for every block of pairs, also an empty one."""

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        """Further sweeps over all blocks, for terms that depend on terms reduced before (`block.reduced`); names must be new."""
        return ()

    def statistics(self, own: Own) -> dict[str, Tensor]:  # noqa: ARG002 - most objectives have none
        """Small sums over this rank's pairs, which are added over all ranks before any loss is computed."""
        return {}

    def row_sums(self, rows: Mapping[Side, Row]) -> dict[str, Tensor]:  # noqa: ARG002 - most objectives have none
        """Small sums over this rank's pairs of what their terms have come to, added over all ranks before any loss is computed.

        `pair_loss` and `batch_loss` then find them among the statistics; the rows given here have none yet.
        """
        return {}

    def row_loss(self, row: Row) -> Tensor:  # noqa: ARG002 - objectives with a pair_loss have none
        """Loss of each pair as seen from one side, from its own logit and its reduced terms: [n]."""
        raise TypeError(f"objective {type(self).__name__} defines neither row_loss nor pair_loss")

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        """Loss of each pair, when it is not simply the sum of both sides: [n]."""
        return self.row_loss(rows["x"]) + self.row_loss(rows["y"])

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor | None:  # noqa: ARG002 - most objectives have none
        """A part of the loss that only depends on the statistics of the global batch of `count` pairs: 0-d."""
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _add_up(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """`{name: clip, add: [...]}` is a composition; everything else is one objective."""
        if cls is not Objective or not isinstance(value, dict) or "add" not in value:
            return handler(value)
        from clipscale.objectives._composition import compose  # it is made of objectives

        return compose(value)  # type: ignore[return-value]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.row_loss is Objective.row_loss and cls.pair_loss is Objective.pair_loss:
            raise TypeError(f"objective {cls.__name__} defines neither row_loss nor pair_loss; it needs one of them")


__all__ = [
    "MAIN",
    "Block",
    "LogSumExp",
    "Max",
    "Need",
    "Objective",
    "Own",
    "Product",
    "Pull",
    "Row",
    "SameText",
    "Side",
    "SoftplusSum",
    "Sum",
    "Term",
    "Terms",
    "View",
    "softplus",
]
