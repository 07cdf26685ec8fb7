"""Phases: where the time of a training step goes, by what the program says it is doing.

Code says `with phase("encode"):` around what it does; whoever wants to know the times runs `with timing(device) as timer:` around the
loop and asks `timer.end_step()`. Without a timer a phase costs nothing. There is one timer in a process, as there is one process group:
collectives are called deep below the loop, and from autograd's threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clipscale.phases.timer import PHASES, Phase, PhaseTimer, StepPhases

if TYPE_CHECKING:
    import torch

_timer: PhaseTimer | None = None


@contextmanager
def timing(device: torch.device) -> Iterator[PhaseTimer]:
    """Measure phases from here on; the first step begins now."""
    global _timer
    before, _timer = _timer, PhaseTimer.of(device)
    try:
        yield _timer
    finally:
        _timer.close()
        _timer = before


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """What happens in here belongs to this phase, except for phases inside it, which have their own time."""
    timer = _timer
    if timer is None:
        yield
        return
    timer.enter(name)
    try:
        yield
    except BaseException:
        timer.interrupted = timer.interrupted or name
        raise
    finally:
        timer.leave()


__all__ = ["PHASES", "Phase", "PhaseTimer", "StepPhases", "phase", "timing"]
