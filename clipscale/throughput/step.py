"""StepTimes: the phases of one step, of all ranks together."""

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

    seconds: float
    """From the end of the step before to the end of this one, the mean over ranks."""
    phases: Mapping[Phase, float]
    """Seconds of every phase, the mean over ranks."""
    longest: Mapping[Phase, float]
    """Seconds of every phase on the rank where it took longest."""
    slowest_rank: int
    """The rank that took longest for data, preparation and encoding, where ranks do not wait for each other."""
    peak_bytes: Mapping[Phase, int]
    """The most memory in use during each phase, on the rank where it was most; empty where the system does not tell."""

    def record(self) -> dict[str, Any]:
        """For timings.jsonl."""
        several = {"longest": dict(self.longest), "slowest_rank": self.slowest_rank}
        memory = {"memory_bytes": max(self.peak_bytes.values()), "peak_bytes": dict(self.peak_bytes)}
        return {"seconds": self.seconds, "phases": dict(self.phases), **several, **(memory if self.peak_bytes else {})}


def own_numbers(phases: StepPhases) -> list[int]:
    """What one rank tells the others about its step."""
    return [*(phases.nanoseconds[name] for name in PHASES), *(phases.peak_bytes.get(name, _UNKNOWN) for name in PHASES)]


def over_ranks(rows: Sequence[Sequence[int]]) -> StepTimes:
    """What every rank told, in rank order."""
    times = [dict(zip(PHASES, row, strict=False)) for row in rows]
    peaks = {name: max(row[place] for row in rows) for place, name in enumerate(PHASES, start=len(PHASES))}
    phases = {name: sum(own[name] for own in times) / len(rows) / 1e9 for name in PHASES}
    alone = [sum(own[name] for name in _ALONE) for own in times]
    return StepTimes(
        seconds=sum(phases.values()),
        phases=phases,
        longest={name: max(own[name] for own in times) / 1e9 for name in PHASES},
        slowest_rank=alone.index(max(alone)),
        peak_bytes={name: peak for name, peak in peaks.items() if peak != _UNKNOWN},
    )
