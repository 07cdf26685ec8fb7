"""Throughput: what a step took by phase, how much it had to compute, and how much of the devices' arithmetic that is."""

from __future__ import annotations

from clipscale.throughput.meter import Meter
from clipscale.throughput.step import StepTimes

__all__ = ["Meter", "StepTimes"]
