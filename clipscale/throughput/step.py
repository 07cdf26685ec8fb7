"""StepTimes: the phases of one step of all ranks together, and what they computed in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipscale.phases import PHASES, Phase, StepPhases

_UNKNOWN = -1
_ALONE: tuple[Phase, ...] = ("data", "prepare", "encode")  # phases in which a rank seldom waits for others


@dataclass(frozen=True)
class StepTimes:
    """One step. Its phases add up to its seconds, and the steps of a call of `train` to the time in its loop."""

    ranks: int
    seconds: float
    """From the end of the step before to the end of this one, the mean over ranks."""
    phases: Mapping[Phase, float]
    """Seconds of every phase, the mean over ranks."""
    longest: Mapping[Phase, float]
    """Seconds of every phase on the rank where it took longest."""
    slowest_rank: int
    """The rank that took longest for data, preparation and encoding, where ranks do not wait for each other."""
    alone: Sequence[float]
    """By rank, seconds of data, preparation and encoding."""
    peak_bytes: Mapping[Phase, int]
    """The most memory in use during each phase, on the rank where it was most; empty where the system does not tell."""
    flops: int | None
    """What all ranks together had to compute, nothing counted twice; None when it could not be counted."""
    peak_flops: float | None
    """FLOPs a second that one device can do at most; None when nobody knows."""

    @property
    def flops_per_second(self) -> float | None:
        """What a device achieved."""
        return None if self.flops is None else self.flops / self.seconds / self.ranks

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: achieved over possible (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        achieved, possible = self.flops_per_second, self.peak_flops
        return None if achieved is None or possible is None else achieved / possible

    def record(self) -> dict[str, Any]:
        """For timings.jsonl."""
        achieved = None if self.flops_per_second is None else self.flops_per_second / 1e12
        several = {"phases_longest": dict(self.longest), "slowest_rank": self.slowest_rank} if self.ranks > 1 else {}
        memory = {"memory_bytes": max(self.peak_bytes.values()), "peak_bytes": dict(self.peak_bytes)} if self.peak_bytes else {}
        work = {"flops": self.flops, "tflops_per_second": achieved, "mfu": self.mfu}
        known = {name: number for name, number in work.items() if number is not None}
        return {"seconds": self.seconds, **known, "phases": dict(self.phases), **several, **memory}


def own_numbers(phases: StepPhases, flops: int | None) -> list[int]:
    """What one rank tells the others about its step."""
    times = [phases.nanoseconds[name] for name in PHASES]
    peaks = [phases.peak_bytes.get(name, _UNKNOWN) for name in PHASES]
    return [*times, *peaks, _UNKNOWN if flops is None else flops]


def over_ranks(rows: Sequence[Sequence[int]], *, peak_flops: float | None) -> StepTimes:
    """What every rank told, in rank order."""
    times = [dict(zip(PHASES, row, strict=False)) for row in rows]
    peaks = {name: max(row[place] for row in rows) for place, name in enumerate(PHASES, start=len(PHASES))}
    flops = [row[-1] for row in rows]
    phases = {name: sum(own[name] for own in times) / len(rows) / 1e9 for name in PHASES}
    alone = [sum(own[name] for name in _ALONE) for own in times]
    return StepTimes(
        ranks=len(rows),
        seconds=sum(phases.values()),
        phases=phases,
        longest={name: max(own[name] for own in times) / 1e9 for name in PHASES},
        slowest_rank=alone.index(max(alone)),
        alone=[nanoseconds / 1e9 for nanoseconds in alone],
        peak_bytes={name: peak for name, peak in peaks.items() if peak != _UNKNOWN},
        flops=None if _UNKNOWN in flops else sum(flops),
        peak_flops=peak_flops,
    )
