"""Towers: one encoder per modality, one file each. Only this package imports open_clip or transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from clipscale.inputs import Input, Modality
from clipscale.settings import Part

if TYPE_CHECKING:
    from clipscale.towers._module import TowerModule


class Tower(Part, ABC):
    """An encoder of one modality: `build` makes the module."""

    folder: ClassVar[str] = "clipscale.towers"
    modality: ClassVar[Modality]

    locked: bool = False
    """Train nothing of this tower (LiT, Zhai et al. 2022, arXiv:2111.07991); its projection still trains."""
    unlocked_blocks: int = Field(default=0, ge=0)
    """With `locked`: train the last n blocks, and whatever stands after them, all the same."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""

    @model_validator(mode="after")
    def _unlocking_needs_a_lock(self) -> Self:
        if self.unlocked_blocks and not self.locked:
            raise ValueError("unlocked_blocks needs `locked: true`: it says what a locked tower trains all the same")
        return self

    @abstractmethod
    def build(self) -> TowerModule:
        """The tower's module, on torch's default device, unlocked: random weights drawn from torch's global generator, or loaded ones.

        On the meta device nothing is loaded: other ranks bring the weights.

        Raises:
            RequestError: the architecture or its weights cannot be found; names what was looked for and where.
        """


__all__ = ["Input", "Tower"]
