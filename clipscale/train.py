"""The training loop, in the order it happens.

A step takes one global batch of every pair kind that is due, encodes them in one graph, takes each kind's exact loss over
all ranks, and updates the weights once (training_step.py). What a step does depends only on (settings, seed, step, world), the
data on (seed, batches taken), so a resumed run repeats the run nobody stopped.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from clipscale import checkpoints, run_folder
from clipscale.checkpoints import Checkpoint, CheckpointStore, Keeper
from clipscale.config import PairKind, Run, to_yaml
from clipscale.data.bad_samples import BadSampleBudget
from clipscale.data.sample import Batch
from clipscale.data.stream import TrainingStream, check_sources, resume_batches
from clipscale.data.tally import Tally
from clipscale.engines import Stepped, Trainable
from clipscale.logbook import Logbook
from clipscale.memory.exhaustion import explaining
from clipscale.memory.micro_batch import MicroBatch, memory_limit
from clipscale.metrics import check_packages
from clipscale.parallel.failures import raised_together
from clipscale.parallel.mesh import Mesh
from clipscale.phases import phase, timing
from clipscale.progress import Progress
from clipscale.run_model import build_model, check_precision, steps_differ, use_precision
from clipscale.signals import StopSignals
from clipscale.throughput import Meter, StepTimes
from clipscale.training_step import Losses, TrainingStep


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    ended: Literal["finished", "stopped", "already finished"]
    step: int
    signal: int | None = None
    """The signal that stopped it, if one did."""


def check(run: Run, *, world: int) -> None:
    """Everything that can be known to be wrong before work starts; writes nothing.

    Raises:
        RequestError: says what was asked, what was found and what to do.
    """
    run.check_world(world)
    for name, kind in run.pair_kinds.items():
        check_sources(kind.sources, kind=name, modalities=kind.modalities)
    check_packages(run.logging)
    if run.checkpoints.store is not None:
        checkpoints.check_store(run.checkpoints.store)
    run_folder.check(run)


def train(run: Run, mesh: Mesh, *, stop_after: int | None = None) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the last step or `stop_after`.

    Raises:
        RequestError: on every rank alike, before anything is written.
        RunError: the run failed; the last checkpoint is whole.
    """
    with raised_together(mesh):
        check(run, world=mesh.world)
    training = _Training(run, mesh)
    try:
        training.start()
        return training.run_to(min(run.steps, stop_after or run.steps))
    finally:
        training.closing.close()


class _Training:
    """A run in progress: model, data, and the files it writes."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        self.data_mesh = run.engine.data_mesh(mesh)
        self.step = 0
        self.tally = Tally(self.data_mesh, BadSampleBudget(max_fraction=run.max_bad_fraction))
        self.signals = StopSignals()
        self.closing = ExitStack()

    # --- start -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Build the model, claim the run folder, and take up where the newest checkpoint stands."""
        run, mesh = self.run, self.mesh
        differ = steps_differ(run)
        with raised_together(mesh):
            model = run.engine.build(partial(build_model, run), mesh)
            check_precision(run, model, mesh.device)
            run.engine.check_model(model, optimizer=run.optimizer, steps_differ=differ)
            self.micro_batch = self._micro_batch()
        size = checkpoints.expected_bytes(model, averaged=run.optimizer.average_decay is not None)
        self._claim_folder(needed_bytes=run.checkpoints.most_kept(run.steps) * size)
        self.meter = Meter(run, model, mesh)
        use_precision(run, model)
        self.trainable: Trainable = run.engine.wrap(model, run.optimizer, mesh, precision=run.precision, steps_differ=differ)
        self.training_step = TrainingStep(run, self.trainable, mesh, self.data_mesh, feed=self.meter.feed)
        self.keeper = self._keeper(expected_bytes=size)
        saved = self._resume()
        with raised_together(mesh):
            places = saved.state["data"] if saved else {}
            self.streams = {name: self._stream(name, kind, places.get(name)) for name, kind in run.pair_kinds.items()}
        self.logbook = Logbook(run, mesh, step=self.step)
        self.closing.callback(self.logbook.close)
        self.closing.callback(self.keeper.close)
        if self.step < run.steps:
            self.logbook.write_event("resumed" if self.step else "started", step=self.step)

    def _claim_folder(self, *, needed_bytes: int) -> None:
        """The first thing that is written; by rank 0, for all."""
        with raised_together(self.mesh):
            if self.mesh.is_main:
                there = checkpoints.bytes_of(self.run.run_folder / "checkpoints")
                run_folder.check(self.run, needed_bytes=max(0, needed_bytes - there))
                self.closing.enter_context(run_folder.claim(self.run))

    def _micro_batch(self) -> MicroBatch:
        run = self.run
        limit = memory_limit(run.memory_gb, self.mesh) if run.micro_batch == "auto" else None
        return MicroBatch(run.micro_batch, share=self.share, limit=limit)

    @property
    def share(self) -> int:
        """Rows of the largest pair kind that this rank has of a global batch."""
        return max(kind.global_batch for kind in self.run.pair_kinds.values()) // self.data_mesh.world

    def _keeper(self, *, expected_bytes: int) -> Keeper:
        run = self.run
        store = None if run.checkpoints.store is None else CheckpointStore(f"{run.checkpoints.store.rstrip('/')}/{run.name}")
        return Keeper(
            run.checkpoints,
            self.mesh,
            run_folder=run.run_folder,
            store=store,
            expected_bytes=expected_bytes,
            tell=lambda event, **said: self.logbook.write_event(event, **said),  # it opens once the step to go on from is known
        )

    def _resume(self) -> Checkpoint | None:
        """Take up the newest whole checkpoint, if there is one."""
        name = self.keeper.newest(check=partial(run_folder.check_same, self.run))
        if name is None:
            return None
        with raised_together(self.mesh):
            saved = checkpoints.load(self.run.run_folder / "checkpoints" / name)
            self.trainable.load(saved.tensors)
            self.tally.budget.take_up(saved.state["bad_samples"])
            self.micro_batch.take_up(saved.state["micro_batch"])
        self.step = saved.step
        return saved

    def _stream(self, name: str, kind: PairKind, saved: dict[str, Any] | None) -> TrainingStream:
        return resume_batches(
            saved,
            kind.sources,
            allow_change=self.run.data.allow_change,
            kind=name,
            modalities=kind.modalities,
            inputs=self.trainable.model.inputs(),
            global_batch=kind.global_batch,
            seed=self.run.seed,
            rank=self.data_mesh.rank,
            world=self.data_mesh.world,
            workers=self.run.workers,
            lanes=self.run.lanes,
            bucket_batches=kind.bucket_batches,
            pin_memory=self.mesh.device.type == "cuda",
        )

    # --- the loop ----------------------------------------------------------------------------------------------

    def run_to(self, last_step: int) -> Outcome:
        """Steps until `last_step`, a signal, or the end."""
        if self.step >= self.run.steps:
            return Outcome("already finished", self.step)
        if self.step >= last_step:
            return Outcome("stopped", self.step)
        with Progress(self.run, first_step=self.step, shown=self.mesh.is_main) as progress, timing(self.mesh.device) as timer:
            while self.step < last_step:
                self.step += 1
                batches = self._next_batches()
                self.tally.count(batches, tell=partial(self.logbook.write_bad_samples, step=self.step))
                for name, of_ranks in self.tally.finished.items():
                    for shards in of_ranks:
                        self.streams[name].note(shards)
                with explaining(timer, step=self.step, rows=self.micro_batch.rows, share=self.share):
                    record = self._train_step(batches)
                end = self.meter.end_step(timer, signal=self.signals.received, save=self.keeper.news())
                times, stop = end.times, end.signal
                self._learn(batches, times)
                self.logbook.write_step(record, times, reading=self._reading(batches))
                progress.show(record, times)
                due, last = self.keeper.due(self.step, news=end.save, loss=record["loss"]), stop or self.step == last_step
                if due or last:
                    with phase("checkpoint"):
                        self._save(wait=bool(last))
                if stop:
                    self.logbook.write_event("stopped", step=self.step, detail=f"signal {stop}")
                    return Outcome("stopped", self.step, signal=stop)
        finished = self.step == self.run.steps
        self.logbook.write_event(
            "finished" if finished else "stopped", step=self.step, detail="" if finished else "as asked by --stop-after"
        )
        return Outcome("finished" if finished else "stopped", self.step)

    def _next_batches(self) -> dict[str, Batch]:
        due = [name for name, kind in self.run.pair_kinds.items() if (self.step - 1) % kind.every == 0]
        with phase("data"):
            return {name: next(self.streams[name]) for name in due}

    def _learn(self, batches: dict[str, Batch], times: StepTimes) -> None:
        """What the step's memory says about the micro-batch; steps without some pair kind say nothing."""
        if (
            len(batches) == len(self.run.pair_kinds)
            and times.peak_bytes
            and (found := self.micro_batch.learn(max(times.peak_bytes.values())))
        ):
            self.logbook.write_event("micro_batch", step=self.step, detail=found)

    def _train_step(self, batches: dict[str, Batch]) -> dict[str, Any]:
        """One update of the weights; returns the step's line in metrics.jsonl."""
        lr = self.run.optimizer.lr * self.run.schedule.fraction(self.step, steps=self.run.steps)
        losses, stepped = self.training_step.take(self.step, batches, lr=lr, micro_batch=self.micro_batch.rows)
        return self._record(losses, lr=lr, stepped=stepped)

    # --- what it leaves ----------------------------------------------------------------------------------------

    def _record(self, losses: Losses, *, lr: float, stepped: Stepped) -> dict[str, Any]:
        kinds: dict[str, dict[str, Any]] = {}
        for name, (output, result) in losses.items():
            bias = {} if output.bias is None else {"bias": float(output.bias.detach())}
            metrics = {key: float(value) for key, value in result.metrics.items()}
            kinds[name] = {"loss": float(result.loss.detach()), "scale": float(output.scale.detach()), **bias, **metrics}
            kinds[name]["padding"] = self.tally.padding[name]
            kinds[name]["epochs"] = self.streams[name].epochs()
        total = math.fsum(self.run.pair_kinds[name].loss_weight * kind["loss"] for name, kind in kinds.items())
        samples = sum(math.ceil(self.step / kind.every) * kind.global_batch for kind in self.run.pair_kinds.values())
        return {
            "step": self.step,
            "samples": samples,
            "lr": lr,
            "grad_norm": stepped.norm if math.isfinite(stepped.norm) else None,
            "grad_norms": {name: norm if math.isfinite(norm) else None for name, norm in stepped.norms.items()},
            **({} if stepped.loss_scale is None else {"loss_scale": stepped.loss_scale, "skipped": int(stepped.skipped)}),
            "loss": total,
            "bad_samples": self.tally.budget.bad,
            **({"bad_by_source": self.tally.budget.reasons} if self.tally.budget.bad else {}),
            "kinds": kinds,
        }

    def _reading(self, batches: dict[str, Batch]) -> dict[str, dict[str, float]]:
        """What this rank's rows of each source took to read, and how long their pair kind's batch was waited for."""
        return {
            f"{kind}/{source}": {**took, "batch_wait_seconds": self.streams[kind].waited_s}
            for kind, batch in batches.items()
            for source, took in batch.reading.items()
        }

    def _save(self, *, wait: bool) -> None:
        """A checkpoint of this step; training goes on while it is written, unless it is waited for."""
        state = {
            "data": {name: stream.state() for name, stream in self.streams.items()},
            "bad_samples": self.tally.budget.state(),
            "micro_batch": self.micro_batch.state(),
            "seed": self.run.seed,
            "world": self.mesh.world,
        }
        self.keeper.save(self.step, tensors=self.trainable.state, state=state, config=to_yaml(self.run), wait=wait)
