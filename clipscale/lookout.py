"""Lookout: whatever a run watches its ranks for while it trains, as its settings say (clipscale/watch)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from clipscale.config import Run
from clipscale.logbook import Logbook
from clipscale.model import Encoders
from clipscale.parallel.failures import raised_together
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.throughput import StepTimes
from clipscale.watch.replicas import check_replicas
from clipscale.watch.stragglers import Stragglers
from clipscale.watch.watchdog import Watchdog


class Lookout:
    """Made by all ranks together, for a model that its engine has wrapped."""

    def __init__(self, run: Run, model: Encoders, mesh: Mesh, logbook: Logbook) -> None:
        self._run, self._model, self._mesh, self._logbook = run, model, mesh, logbook
        self._settings = run.watch
        self._replicas = run.engine.replicas(mesh)
        factor = run.watch.straggler_factor
        self._stragglers = None if factor is None else Stragglers(factor, world=mesh.world)

    def watching(self, timer: PhaseTimer, *, step: Callable[[], int]) -> AbstractContextManager[object]:
        """Ranks that hang are found in here."""
        limit_s = self._settings.hang_s
        if limit_s is None:
            return nullcontext()
        return Watchdog(self._run.run_folder, self._mesh, timer, step=step, limit_s=limit_s, patient_s=self._run.timeout_s)

    def after_step(self, step: int, times: StepTimes) -> None:
        """Name ranks that lag; compare copies of the weights when it is time.

        Raises:
            ReplicasDiffer: on every rank.
        """
        for found in () if self._stragglers is None else self._stragglers.step(times.alone):
            self._logbook.write_event("straggler", step=step, detail=found)
            if self._mesh.is_main:
                print(f"step {step}: {found}", file=sys.stderr)
        if self._settings.replicas_every is not None and step % self._settings.replicas_every == 0:
            self.compare_replicas(step)

    def compare_replicas(self, step: int) -> None:
        """Before weights are saved: nothing that erred may come into a checkpoint."""
        if self._replicas is None or self._settings.replicas_every is None:
            return
        with raised_together(self._mesh):
            check_replicas(self._model.named_parameters(), self._replicas, step=step)
