"""What a run writes while it trains: numbers of every step, events, bad samples; by rank 0, for all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipscale import run_folder
from clipscale.config import Run
from clipscale.data.sample import BadSample
from clipscale.metrics import JsonLines, Logger, flatten, open_loggers
from clipscale.parallel.mesh import Mesh
from clipscale.throughput import StepTimes


class Logbook:
    """The run folder's JSON lines and the loggers asked for; written between `open` and `close`."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        self._run, self._mesh = run, mesh
        self._files: dict[str, JsonLines] = {}
        self._loggers: list[Logger] = []

    def open(self, *, step: int) -> None:
        """Begin behind `step`. Lines of later steps are cut off: the files are those of one run."""
        run, mesh = self._run, self._mesh
        if not mesh.is_main:
            return
        folder = run.run_folder
        if not (folder / "environment.json").exists():
            run_folder.write_environment(folder, seed=run.seed, device=str(mesh.device), world=mesh.world, command=sys.argv)
        for name in ("metrics", "timings", "events", "bad_samples"):
            self._files[name] = JsonLines(folder / f"{name}.jsonl", keep_through_step=step)
        settings = run.model_dump(mode="json", serialize_as_any=True)
        self._loggers = open_loggers(run.logging, name=run.name, folder=folder, settings=settings, first_step=step + 1)

    def write_step(self, record: dict[str, Any], times: StepTimes, *, reading: Mapping[str, Mapping[str, float]]) -> None:
        """A step's numbers, what it took on all ranks, and what this rank's sources took to read."""
        if not self._mesh.is_main:
            return
        step, samples = record["step"], sum(self._run.pair_kinds[name].global_batch for name in record["kinds"])
        timing = {"step": step, "samples_per_second": samples / times.seconds, **times.record()}
        timing["sources"] = {name: {**took, "rows_per_second": took["rows"] / times.seconds} for name, took in reading.items()}
        self._files["metrics"].write(record)
        self._files["timings"].write(timing)
        for logger in self._loggers:
            logger.write(step, {**flatten(record), **flatten(timing, prefix="timing/")})

    def write_event(self, event: str, *, step: int, detail: str = "") -> None:
        """Something that happened once: started, resumed, checkpoint, stopped, finished."""
        if self._mesh.is_main:
            self._files["events"].write({"event": event, "step": step, "time": run_folder.now(), "detail": detail})

    def write_bad_samples(self, kind: str, bad: Sequence[BadSample], *, step: int) -> None:
        """Samples that could not be read, of any rank."""
        for item in bad if self._mesh.is_main else []:
            place = {"source": item.source, "key": item.key, "where": item.where}
            self._files["bad_samples"].write({"step": step, "kind": kind, **place, "reason": item.reason})

    def close(self) -> None:
        """Write out what is buffered."""
        for file in self._files.values():
            file.close()
        for logger in self._loggers:
            logger.close()
