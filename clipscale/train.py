"""The training loop, in the order it happens.

A step takes one global batch of every pair kind that is due, encodes them in one graph, takes each kind's exact loss over
all ranks, and updates the weights once (training_step.py). What a step does depends only on (settings, seed, step, world), the
data on (seed, batches taken), so a resumed run repeats the run nobody stopped.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from clipscale import checkpoints, run_folder
from clipscale.checkpoints import Checkpoint, CheckpointStore, Keeper
from clipscale.config import Run, to_yaml
from clipscale.data.bad_samples import BadSampleBudget
from clipscale.data.sample import Batch
from clipscale.data.stream import check_sources
from clipscale.data.tally import Tally
from clipscale.ending import Ending, EndingFiles, places
from clipscale.engines import Trainable
from clipscale.errors import NonFiniteLoss
from clipscale.guard import Decision, Guard
from clipscale.logbook import Logbook
from clipscale.lookout import Lookout
from clipscale.memory.exhaustion import explaining
from clipscale.memory.micro_batch import MicroBatch, memory_limit
from clipscale.metrics import check_packages
from clipscale.parallel.failures import raised_together
from clipscale.parallel.mesh import Mesh
from clipscale.phases import phase, timing
from clipscale.progress import Progress
from clipscale.run_data import open_streams, reading_times
from clipscale.run_model import build_model, check_precision, steps_differ, use_precision
from clipscale.signals import TIME_IS_UP, StopSignals
from clipscale.step_record import kind_records, step_record
from clipscale.throughput import Meter, StepTimes
from clipscale.training_step import Taken, TrainingStep
from clipscale.watch.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    ended: Literal["finished", "stopped", "already finished"]
    step: int
    signal: int | None = None
    """The signal that stopped it, if one did."""

    @property
    def ending(self) -> Ending:
        """What ended.json says of it."""
        return Ending("stopped" if self.ended == "stopped" else "finished", step=self.step, signal=self.signal)


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


def train(run: Run, mesh: Mesh, *, stop_after: int | None = None, stop_after_minutes: float | None = None) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the last step or `stop_after`, or until the minutes are over.

    Raises:
        RequestError: on every rank alike, before anything is written.
        RunError: the run failed; the last checkpoint is whole.
    """
    with raised_together(mesh):
        check(run, world=mesh.world)
    training = _Training(run, mesh, stop_after_s=None if stop_after_minutes is None else 60 * stop_after_minutes)
    with training.closing:
        training.start()
        outcome = training.run_to(min(run.steps, stop_after or run.steps))
        training.ending.tell(outcome.ending)
        return outcome


class _Training:
    """A run in progress: model, data, and the files it writes."""

    def __init__(self, run: Run, mesh: Mesh, *, stop_after_s: float | None = None) -> None:
        self.run, self.mesh = run, mesh
        self.data_mesh = run.engine.data_mesh(mesh)
        self.step = 0
        self.tally = Tally(self.data_mesh, BadSampleBudget(max_fraction=run.max_bad_fraction))
        self.guard = Guard(run.guard)
        self.signals = StopSignals(after_s=stop_after_s)
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
            self.streams = open_streams(run, self.trainable.model.inputs(), self.data_mesh, places=places)
        self.logbook = Logbook(run, mesh)
        self.logbook.open(step=self.step)
        self.lookout = Lookout(run, self.trainable.model, mesh, self.logbook)
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
                Watchdog.clear(self.run.run_folder)
        files = places(self.run.run_folder, rank=self.mesh.rank, local_rank=self.mesh.local_rank)
        self.ending = self.closing.enter_context(EndingFiles(files))

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
        saved = self._newest()
        if saved is None:
            return None
        with raised_together(self.mesh):
            self.trainable.load(saved.tensors)
            self.tally.budget.take_up(saved.state["bad_samples"])
            self.micro_batch.take_up(saved.state["micro_batch"])
            if "guard" in saved.state:  # checkpoints of earlier versions have none
                self.guard.take_up(saved.state["guard"])
        self.step = saved.step
        return saved

    def _newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, read by every rank."""
        name = self.keeper.newest(check=partial(run_folder.check_same, self.run))
        if name is None:
            return None
        with raised_together(self.mesh):
            return checkpoints.load(self.run.run_folder / "checkpoints" / name)

    # --- the loop ----------------------------------------------------------------------------------------------

    def run_to(self, last_step: int) -> Outcome:
        """Steps until `last_step`, a signal, or the end."""
        if self.step >= self.run.steps:
            return Outcome("already finished", self.step)
        if self.step >= last_step:
            return Outcome("stopped", self.step)
        with (
            Progress(self.run, first_step=self.step, shown=self.mesh.is_main) as progress,
            timing(self.mesh.device) as timer,
            self.lookout.watching(timer, step=lambda: self.step),
        ):
            while self.step < last_step:
                self.step += 1
                batches = self._next_batches()
                self.tally.count(batches, tell=partial(self.logbook.write_bad_samples, step=self.step))
                for name, of_ranks in self.tally.finished.items():
                    for shards in of_ranks:
                        self.streams[name].note(shards)
                with explaining(timer, step=self.step, rows=self.micro_batch.rows, share=self.share):
                    record, decision = self._train_step(batches)
                end = self.meter.end_step(timer, signal=self.signals.received, save=self.keeper.news())
                self._learn(batches, end.times)
                self.logbook.write_step(record, end.times, reading=reading_times(batches, self.streams))
                progress.show(record, end.times)
                self.lookout.after_step(self.step, end.times)
                if decision == "stop":
                    raise NonFiniteLoss(f"step {self.step}: {self.guard.why_it_stops()}")
                if decision == "roll back":
                    with phase("checkpoint"):
                        self._roll_back()
                due, last = self.keeper.due(self.step, news=end.save, loss=record["loss"]), end.signal or self.step == last_step
                if due or last:
                    with phase("checkpoint"):
                        self._save(wait=bool(last))
                if end.signal == TIME_IS_UP:
                    break
                if end.signal:
                    self.logbook.write_event("stopped", step=self.step, detail=f"signal {end.signal}")
                    return Outcome("stopped", self.step, signal=end.signal)
        ended: Literal["finished", "stopped"] = "finished" if self.step == self.run.steps else "stopped"
        self.logbook.write_event(ended, step=self.step, detail="" if ended == "finished" else "as asked by --stop-after(-minutes)")
        return Outcome(ended, self.step)

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

    def _train_step(self, batches: dict[str, Batch]) -> tuple[dict[str, Any], Decision]:
        """One update of the weights; returns the step's line in metrics.jsonl, and what the guard says of it."""
        lr = self.run.optimizer.lr * self.run.schedule.fraction(self.step, steps=self.run.steps)
        taken = self.training_step.take(self.step, batches, lr=lr, micro_batch=self.micro_batch.rows, loss_limits=self.guard.limits)
        decision = self._judge(taken)
        return self._record(taken, batches, lr=lr), decision

    def _judge(self, taken: Taken) -> Decision:
        """What the guard says of the step; the same on all ranks."""
        if taken.fault is None:
            self.guard.counted({name: float(result.loss.detach()) for name, (_, result) in taken.losses.items()})
            return "go on"
        decision = self.guard.leave_out(self.step, taken.fault)
        self.logbook.write_event("left out", step=self.step, detail=taken.fault)
        return decision

    def _roll_back(self) -> None:
        """The newest checkpoint's weights and step number, with the data that come next: those in between led astray.

        Raises:
            NonFiniteLoss: there is no checkpoint, or going back has not helped; with the evidence.
        """
        from_step, evidence = self.step, self.guard.evidence()
        self.guard.rolled_back()
        saved = self._newest()
        if saved is None:
            raise NonFiniteLoss(f"step {from_step}: too many steps were left out, and there is no checkpoint to go back to: {evidence}")
        with raised_together(self.mesh):
            self.trainable.load(saved.tensors)
        self.step = saved.step
        self.logbook.close()
        self.logbook.open(step=self.step)
        self.logbook.write_event("rolled back", step=self.step, detail=f"from step {from_step}, past the data since: {evidence}")

    # --- what it leaves ----------------------------------------------------------------------------------------

    def _record(self, taken: Taken, batches: dict[str, Batch], *, lr: float) -> dict[str, Any]:
        due = {name: {"padding": self.tally.padding[name], "epochs": self.streams[name].epochs()} for name in batches}
        record = step_record(self.run, taken, kind_records(taken, due), step=self.step, lr=lr, left_out=self.guard.left_out)
        bad = self.tally.budget
        return {**record, "bad_samples": bad.bad, **({"bad_by_source": bad.reasons} if bad.bad else {})}

    def _save(self, *, wait: bool) -> None:
        """A checkpoint of this step; training goes on while it is written, unless it is waited for."""
        self.lookout.compare_replicas(self.step)
        state = {
            "data": {name: stream.state() for name, stream in self.streams.items()},
            "bad_samples": self.tally.budget.state(),
            "micro_batch": self.micro_batch.state(),
            "guard": self.guard.state(),
            "seed": self.run.seed,
            "world": self.mesh.world,
        }
        self.keeper.save(self.step, tensors=self.trainable.state, state=state, config=to_yaml(self.run), wait=wait)
