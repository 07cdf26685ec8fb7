"""Meter: what each step took and computed, told by every rank to all in the one exchange that a step ends with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipscale.config import Run
from clipscale.model import Encoders, PreparedKinds
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.throughput.devices import peak_flops
from clipscale.throughput.step import StepTimes, over_ranks, own_numbers
from clipscale.throughput.work import count_work


@dataclass(frozen=True)
class StepEnd:
    """What all ranks know alike when a step is over."""

    times: StepTimes
    signal: int
    """The largest of all ranks."""
    save: int
    """The largest of all ranks."""


class Meter:
    """Made by all ranks together, from the model that `Engine.build` gave, before the engine wraps it."""

    def __init__(self, run: Run, model: Encoders, mesh: Mesh) -> None:
        self._mesh = mesh
        self._work = count_work(run, model, mesh, data_ranks=run.engine.data_ranks(mesh.world))
        self._peak = peak_flops(mesh.device, precision=run.precision, told=run.logging.peak_tflops)
        self._flops: int | None = None

    def feed(self, kinds: PreparedKinds) -> None:
        """This rank's rows of the step in progress, as they were read."""
        self._flops = None if self._work is None else self._work.of(kinds)

    def end_step(self, timer: PhaseTimer, *, signal: int, save: int) -> StepEnd:
        """What the step took on all ranks, and what any of them has heard.

        Args:
            signal: number of the stop signal that this rank got, or 0.
            save: what this rank's Keeper has to say.
        """
        own = [signal, save, *own_numbers(timer.end_step(), self._flops)]
        told = self._mesh.gather(torch.tensor(own, dtype=torch.int64, device=self._mesh.device)).tolist()
        times = over_ranks([numbers for _, _, *numbers in told], peak_flops=self._peak)
        return StepEnd(times, signal=max(signal for signal, *_ in told), save=max(save for _, save, *_ in told))
