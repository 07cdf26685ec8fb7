"""Objectives: what is summed over the other side, and what a sample then loses. Nothing here knows of ranks, tiles or engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from clipscale.objectives._terms import Block, LogSumExp, Max, Pull, Row, SameText, Side, Sum, Term, softplus
from clipscale.settings import Part

Need = Literal["bias", "guide", "first_guide", "ids"]


class Objective(Part, ABC):
    """A contrastive loss, stated by the terms it reduces and the loss of a row.

    The loss of a global batch of B pairs is `(Σ row_loss of the x side + Σ row_loss of the y side) / B`. The contrast engine calls
    `terms` on blocks of any size, reduces each term over the whole other side, calls `row_loss` on the results, and gets all gradients
    by itself; positives reach `row_loss` as `row.positive`, so that terms can leave them out and keep their precision on fitted pairs.
    """

    folder: ClassVar[str] = "clipscale.objectives"
    init_bias: ClassVar[float | None] = None
    """Where a learned logit bias starts; none: this objective uses no bias."""

    @property
    def needs(self) -> frozenset[Need]:
        """What must be given besides embeddings and scale.

        `bias`: a learned logit bias. `guide`: features of the second modality's locked tower; `first_guide`: of the first's. `ids`: the
        captions' identities.
        """
        return frozenset()

    @property
    def centres_guide(self) -> bool:
        """Whether the global batch's mean is taken off the guide features before their cosines."""
        return False

    @abstractmethod
    def terms(self, block: Block) -> dict[str, Term]:
        """Named terms for every entry of a block; the same names, kinds and sides for every block, also an empty one."""

    @abstractmethod
    def row_loss(self, row: Row) -> Tensor:
        """Loss of each sample of one side, from its pair's logit and its reduced terms: [n]."""


__all__ = ["Block", "LogSumExp", "Max", "Need", "Objective", "Pull", "Row", "SameText", "Side", "Sum", "Term", "softplus"]
