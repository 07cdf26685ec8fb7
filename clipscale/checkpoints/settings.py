"""Settings of checkpoints: when one is written, which are kept, and where a second copy goes."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from clipscale.settings import Settings


class Checkpoints(Settings):
    """When checkpoints are written, which are kept, and where they are copied to. One is always written at the end and before a requested
    stop, and whenever it is asked for: by a file called `save` in the run folder."""

    every_steps: int | None = Field(default=1000, gt=0)
    """Steps between checkpoints; none: not by steps."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, by rank 0's clock; none: not by time."""
    keep_last: int = Field(default=3, gt=0)
    """The newest so many are kept. Others are removed once a newer one is whole on disk, unless the next two settings keep them."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that are multiples of this are kept for good."""
    keep_best: int = Field(default=0, ge=0)
    """So many are kept whose training loss, the mean over the steps since the checkpoint before, is lowest."""
    store: str | None = None
    """An fsspec address, s3://bucket/runs say, or a folder: every checkpoint is copied to `store`/NAME, manifest last, and removed there as
    it is here. A run whose folder holds no checkpoint goes on from the newest whole one there."""
    failures_allowed: int = Field(default=2, ge=0)
    """Saves in a row that may fail, for want of room say, before the run ends; each is told. One at the end or before a stop may not."""

    @model_validator(mode="after")
    def _something_decides(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("every_steps and every_minutes are both null: a killed run would begin anew; set one of them")
        return self

    def seconds_between(self, step_s: float) -> float:
        """Seconds between two checkpoints, when a step takes `step_s`."""
        by_steps = math.inf if self.every_steps is None else self.every_steps * step_s
        by_time = math.inf if self.every_minutes is None else 60 * self.every_minutes
        return min(by_steps, by_time)

    def most_kept(self, steps: int) -> int:
        """The most checkpoints that a run of so many steps has on disk at once, the one being written included."""
        for_good = steps // self.keep_every if self.keep_every else 0
        return self.keep_last + self.keep_best + for_good + 1
