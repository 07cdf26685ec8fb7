"""PhaseTimer: a step's time and memory, cut where phases begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from clipscale.phases.clocks import Clock, CudaClock, HostClock
from clipscale.phases.peaks import Peak, peak_of

Phase = Literal["data", "prepare", "encode", "contrast", "backward", "optimizer", "communication", "checkpoint", "other"]
"""data: waiting for batches. prepare: bringing rows to the device, augmentation, normalisation, log-mel. encode: the towers' forward
passes. contrast: the loss and its gradients for the embeddings. backward, optimizer: as they say. communication: collectives that
this program calls itself. checkpoint: writing one. other: what no phase claims."""
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class StepPhases:
    """One step of one rank."""

    nanoseconds: Mapping[Phase, int]
    """Of every phase; together the whole time from the end of the step before to the end of this one."""
    peak_bytes: Mapping[Phase, int]
    """The most memory in use in each phase that occurred, collectives inside it included; empty where the system does not tell."""


class PhaseTimer:
    """Marks where phases begin and end. The time between two marks belongs to the innermost phase there."""

    interrupted: Phase | None = None
    """The innermost phase that an exception ended."""

    def __init__(self, clock: Clock, peak: Peak | None) -> None:
        self._clock, self._peak = clock, peak
        self._inside: list[Phase] = ["other"]
        self._moments: list[Any] = [self._clock.now()]
        self._before: list[Phase] = []  # which phase each moment but the first ends
        self._peaks: dict[Phase, int] = {}

    @classmethod
    def of(cls, device: torch.device) -> PhaseTimer:
        """By a device's own clock and account of memory."""
        return cls(CudaClock() if device.type == "cuda" else HostClock(), peak_of(device))

    @property
    def marks(self) -> int:
        """Beginnings and ends of phases since the step began; another thread may ask."""
        return len(self._before)

    @property
    def innermost(self) -> Phase:
        """The phase in progress; another thread may ask."""
        return self._inside[-1]

    def within(self, phase: Phase) -> bool:
        """Whether a phase is in progress, perhaps around others; another thread may ask."""
        return phase in self._inside

    def enter(self, phase: Phase) -> None:
        """A phase begins."""
        self._mark(outermost=len(self._inside) == 1)
        self._inside.append(phase)

    def leave(self) -> None:
        """The phase that began last ends."""
        self._mark(outermost=len(self._inside) == 2)
        self._inside.pop()

    def end_step(self) -> StepPhases:
        """What has been measured since the last call, or since the beginning. Waits until the device has done it."""
        assert len(self._inside) == 1, f"a step ends outside of all phases, and this is inside {self._inside}"
        self._mark(outermost=True)
        offsets = self._clock.offsets(self._moments)
        nanoseconds = dict.fromkeys(PHASES, 0)
        for phase, (begun, ended) in zip(self._before, pairwise(offsets), strict=True):
            nanoseconds[phase] += ended - begun
        taken = StepPhases(nanoseconds, self._peaks)
        self._moments, self._before, self._peaks = self._moments[-1:], [], {}
        return taken

    def _mark(self, *, outermost: bool) -> None:
        phase = self._inside[-1]
        if outermost and self._peak is not None:
            self._peaks[phase] = max(self._peaks.get(phase, 0), self._peak.take())
        self._moments.append(self._clock.now())
        self._before.append(phase)

    def close(self) -> None:
        """Give back what this holds."""
        if self._peak is not None:
            self._peak.close()
