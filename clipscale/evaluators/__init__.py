"""Evaluators: what a checkpoint can do, one question a file. Embed, then score, then report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from clipscale.evaluators._evaluation import Confusion, Evaluation, Example, Figure, Group, Item, Outcomes
from clipscale.inputs import Modality
from clipscale.settings import Part

if TYPE_CHECKING:
    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh


class Evaluator(Part, ABC):
    """A question put to a trained model, and the data it is asked on."""

    folder: ClassVar[str] = "clipscale.evaluators"

    @abstractmethod
    def modalities(self) -> set[Modality]:
        """The modalities the model needs towers for."""

    @abstractmethod
    def check(self) -> None:
        """Look at the data without reading samples.

        Raises:
            DataError: a data set is missing, empty, or lacks the modality.
        """

    @abstractmethod
    def evaluate(self, model: Encoders, mesh: Mesh) -> Evaluation:
        """Figures with n and a 95 % interval; the same on every rank, and the same integer counts for any number of ranks.

        All ranks call it together; each embeds its share of the rows.

        Raises:
            RunError: a sample cannot be read (there is never a silently smaller n), or an embedding is not finite.
            DataError: records lack the field that is asked about.
        """


__all__ = ["Confusion", "Evaluation", "Evaluator", "Example", "Figure", "Group", "Item", "Outcomes"]
