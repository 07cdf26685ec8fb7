"""Throughput: what a step took on all ranks, by phase."""

from __future__ import annotations

from clipscale.throughput.step import StepTimes, over_ranks, own_numbers

__all__ = ["StepTimes", "over_ranks", "own_numbers"]
