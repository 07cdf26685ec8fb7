"""Clocks: moments of the host, or of a CUDA stream; read once a step is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Something that marks moments, and later says how far apart they were."""

    def now(self) -> Any:
        """Mark this moment."""

    def offsets(self, moments: Sequence[Any]) -> list[int]:
        """Nanoseconds from the first moment to each, in the order they were marked; moments but the last are not asked about again."""


class HostClock:
    """The host's monotonic clock."""

    def now(self) -> int:
        """Nanoseconds."""
        return time.perf_counter_ns()

    def offsets(self, moments: Sequence[int]) -> list[int]:
        """Nanoseconds from the first moment."""
        return [moment - moments[0] for moment in moments]


class CudaClock:
    """Events on the current stream: when the GPU came to these places, not when the host did.

    Marking waits for nothing. Time in which the GPU has nothing to do belongs to the phase whose work it waits for.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        """An event, recorded."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def offsets(self, moments: Sequence[torch.cuda.Event]) -> list[int]:
        """Nanoseconds from the first event; waits until the last one has happened."""
        moments[-1].synchronize()
        offsets = [0, *(round(moments[0].elapsed_time(moment) * 1e6) for moment in moments[1:])]
        self._free += moments[:-1]
        return offsets
