"""Towers: one encoder per modality, one file each. Only this package imports open_clip or transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from clipscale.inputs import Input, Modality
from clipscale.settings import Part
from clipscale.towers._recompute import Recompute

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
    recompute: Recompute | None = None
    """Make activations again in the backward pass instead of keeping them: `true` all blocks', a mapping what it says; none: keep all."""
    compile: bool = False
    """Let torch.compile make one piece of each block; the first steps take minutes longer."""

    @field_validator("recompute", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _unlocking_needs_a_lock(self) -> Self:
        if self.unlocked_blocks and not self.locked:
            raise ValueError("unlocked_blocks needs `locked: true`: it says what a locked tower trains all the same")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_are_one_piece(self) -> Self:
        if self.compile and self.recompute is not None and self.recompute.part == "attention":
            raise ValueError("a compiled block is one piece, whose attention cannot be made again alone; set recompute.part: block")
        return self

    @abstractmethod
    def build(self) -> TowerModule:
        """The tower's module, on torch's default device, unlocked: random weights drawn from torch's global generator, or loaded ones.

        On the meta device nothing is loaded: other ranks bring the weights.

        Raises:
            RequestError: the architecture or its weights cannot be found; names what was looked for and where.
        """


__all__ = ["Input", "Tower"]
