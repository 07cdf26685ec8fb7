"""The learning-rate schedule: a fraction of the top rate, by step alone."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from clipscale.settings import Settings


class Schedule(Settings):
    """The learning rate as a fraction of its top, a pure function of the step."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """It rises linearly over these first steps."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """What is left of it at the last step."""

    def fraction(self, step: int, *, steps: int) -> float:
        """The fraction at `step` of 1…`steps`."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * falling
