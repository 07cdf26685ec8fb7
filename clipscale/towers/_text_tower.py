"""TextTower: the settings that every text tower has."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from clipscale.inputs import Modality
from clipscale.towers import Tower


class TextTower(Tower):
    """An encoder of captions."""

    modality: ClassVar[Modality] = "text"

    cached_rows: int = Field(default=0, ge=0)
    """With a wholly locked tower: keep the features of this many different captions, the least recently used go first.

    Worth it where captions repeat: while training, a new caption is encoded alone, so that its features depend on nothing else."""

    @model_validator(mode="after")
    def _cache_needs_a_locked_tower(self) -> Self:
        if self.cached_rows and (not self.locked or self.unlocked_blocks):
            raise ValueError("cached_rows needs `locked: true` and no unlocked_blocks: features of a tower that trains change")
        return self
