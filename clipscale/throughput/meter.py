"""Meter: what each step took and computed, told by every rank to all in the one exchange that a step ends with."""

from __future__ import annotations

import torch

from clipscale.config import Run
from clipscale.model import Encoders, PreparedKinds
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.throughput.devices import peak_flops
from clipscale.throughput.step import StepTimes, over_ranks, own_numbers
from clipscale.throughput.work import count_work


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

    def end_step(self, timer: PhaseTimer, *, signal: int) -> tuple[StepTimes, int]:
        """What the step took on all ranks, and the largest `signal` of any rank."""
        own = [signal, *own_numbers(timer.end_step(), self._flops)]
        told = self._mesh.gather(torch.tensor(own, dtype=torch.int64, device=self._mesh.device)).tolist()
        return over_ranks([numbers for _, *numbers in told], peak_flops=self._peak), max(number for number, *_ in told)
