"""Guard: leaves out steps whose loss or gradients are no numbers, or far too high; goes back when they are many; gives up with evidence.

A step that is left out changes neither weights nor optimizer state on any rank, because every engine drops gradients whose norm is not
finite, and the norm is one number on all ranks. Going back to a checkpoint and past the data that led astray is PaLM's way (Chowdhery et
al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from clipscale.settings import Settings

_HISTORY = 100
"""Losses of a pair kind that a spike is measured against."""
_ENOUGH = 20
"""Losses there must be before one can be a spike."""
_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


Decision = Literal["go on", "roll back", "stop"]
"""What to do after a step."""


class GuardSettings(Settings):
    """What a run does about steps whose loss or gradients are not finite, or spike."""

    max_left_out: int = Field(default=3, ge=0)
    """Such steps are left out, on all ranks alike; more than this many among the last `window` steps, and the run goes back to its newest
    checkpoint, with the data that follow the trouble. 0: the first one is one too many."""
    window: int = Field(default=100, gt=0)
    """Steps."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often a run goes back before it stops and says what it met."""
    spike: float | None = Field(default=None, gt=0)
    """Also leave out a step in which the loss of a pair kind lies so many standard deviations above the median of its last 100 that counted
    (the deviation from the median absolute one, and no less than a hundredth of the median); 10 is a spike by any measure. None: no finite
    loss is one."""


@dataclass(frozen=True)
class LeftOut:
    """A step that changed nothing, and why."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


class Guard:
    """Judges every step; all ranks see the same numbers and judge alike."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._losses: dict[str, deque[float]] = {}
        self._recent: list[LeftOut] = []
        self.left_out = 0
        """Steps left out since the run began."""
        self.rollbacks = 0

    @property
    def limits(self) -> dict[str, float]:
        """By pair kind, the loss above which its next one is a spike; without those of which none is."""
        spike = self._settings.spike
        known = {kind: losses for kind, losses in self._losses.items() if len(losses) >= _ENOUGH}
        return {} if spike is None else {kind: _limit(losses, spike) for kind, losses in known.items()}

    def counted(self, losses: Mapping[str, float]) -> None:
        """A step was taken; its losses by pair kind."""
        for kind, loss in losses.items():
            self._losses.setdefault(kind, deque(maxlen=_HISTORY)).append(loss)

    def leave_out(self, step: int, reason: str) -> Decision:
        """A step changed nothing; what to do."""
        self.left_out += 1
        self._recent = [item for item in self._recent if item.step > step - self._settings.window] + [LeftOut(step, reason)]
        if len(self._recent) <= self._settings.max_left_out:
            return "go on"
        return "roll back" if self.rollbacks < self._settings.max_rollbacks else "stop"

    def rolled_back(self) -> None:
        """The run has gone back to a checkpoint: what lies behind is no measure for what comes."""
        self.rollbacks += 1
        self._recent = []
        self._losses.clear()

    def evidence(self) -> str:
        """The steps left out lately, with their reasons."""
        return "; ".join(map(str, self._recent))

    def why_it_stops(self) -> str:
        """For the error that ends the run."""
        back = f", and the run has gone back {self.rollbacks} times" if self.rollbacks else ""
        return (
            f"more than {self._settings.max_left_out} of the last {self._settings.window} steps were left out{back}: {self.evidence()}; "
            "the weights are those before: look at the samples named, or lower the learning rate"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run judges as the one nobody stopped."""
        return {
            "losses": {kind: list(losses) for kind, losses in self._losses.items()},
            "recent": [[item.step, item.reason] for item in self._recent],
            "left_out": self.left_out,
            "rollbacks": self.rollbacks,
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._losses = {kind: deque(losses, maxlen=_HISTORY) for kind, losses in state["losses"].items()}
        self._recent = [LeftOut(step, reason) for step, reason in state["recent"]]
        self.left_out, self.rollbacks = state["left_out"], state["rollbacks"]


def _limit(losses: Collection[float], spike: float) -> float:
    middle = median(losses)
    deviation = _TO_DEVIATION * median(abs(loss - middle) for loss in losses)
    return middle + spike * max(deviation, 0.01 * abs(middle))
