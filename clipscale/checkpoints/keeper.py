"""Keeper: decides when a checkpoint is taken, takes it while training goes on, and keeps what is to be kept.

Rank 0 copies the state as it is after a step (snapshot.py), and a thread of its own writes, sums and renames it, copies it to the store and
removes what is no longer kept. There is never more than one save under way: the next one waits for it. All ranks learn in the exchange that
every step ends with that a checkpoint is wanted, or that rank 0's thread has failed too often.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from clipscale.checkpoints.reading import find_newest, step_of
from clipscale.checkpoints.requests import Requests
from clipscale.checkpoints.retention import remove_others
from clipscale.checkpoints.settings import Checkpoints
from clipscale.checkpoints.snapshot import Snapshot, Tensors
from clipscale.checkpoints.store import CheckpointStore, newest_in
from clipscale.checkpoints.writing import save
from clipscale.errors import CheckpointError, ClipscaleError
from clipscale.parallel.failures import raised_together
from clipscale.parallel.mesh import Mesh

NOTHING, WANTED, FAILED = 0, 1, 2
"""What a rank has to say at the end of a step; the largest of all ranks counts."""


class Tell(Protocol):
    """Writes an event into the run's logbook."""

    def __call__(self, event: str, *, step: int, detail: str) -> None: ...


class Keeper:
    """The checkpoints of a run in progress. All ranks call `due`, `save` and `finish` together."""

    def __init__(
        self, settings: Checkpoints, mesh: Mesh, *, run_folder: Path, store: CheckpointStore | None, expected_bytes: int, tell: Tell
    ) -> None:
        """
        Args:
            expected_bytes: of one checkpoint's tensors; only rank 0 holds so many.
        """
        self._settings, self._mesh, self._store, self._tell = settings, mesh, store, tell
        self._folder = run_folder / "checkpoints"
        self._requests = Requests(run_folder, watches_file=mesh.is_main)
        self._snapshot = Snapshot(expected_bytes, pinned=mesh.device.type == "cuda") if mesh.is_main else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[str]] | None = None
        self._failures: list[ClipscaleError] = []
        self._losses: list[float] = []
        self._taken_at = time.monotonic()

    def newest(self, *, check: Callable[..., None]) -> str | None:
        """The name of the newest whole checkpoint in the run folder, where it may just have come to from the store; None: begin anew.

        Args:
            check: called with a checkpoint's settings and `where` it is; raises when another run wrote it.

        Raises:
            CheckpointError: there is none in the run folder, and the store does not answer.
        """
        self._settle()
        with raised_together(self._mesh):
            found = self._find(check) if self._mesh.is_main else None
        name: str | None = self._mesh.gather_objects(found)[0]
        return name

    def _find(self, check: Callable[..., None]) -> str | None:
        newest, damaged = find_newest(self._folder)
        if self._store is not None:
            later, further = self._look_in_store(newest)
            newest, damaged = later or newest, damaged + further
        for line in damaged:
            print(f"skipping a damaged checkpoint: {line}", file=sys.stderr)
        if newest is None:
            return None
        check((newest / "config.yaml").read_text(encoding="utf-8"), where=str(newest))
        return newest.name

    def _look_in_store(self, newest: Path | None) -> tuple[Path | None, list[str]]:
        assert self._store is not None
        try:
            return newest_in(self._store, self._folder, after=-1 if newest is None else step_of(newest.name) or 0)
        except CheckpointError as error:
            if newest is None:
                raise
            print(f"going on from {newest}, for {error}", file=sys.stderr)
            return None, []

    def news(self) -> int:
        """NOTHING, WANTED or FAILED: what this rank tells the others as a step ends."""
        if self._writing is not None and self._writing[1].done():
            self._settle()
        if len(self._failures) > self._settings.failures_allowed:
            return FAILED
        minutes = self._settings.every_minutes
        late = self._mesh.is_main and minutes is not None and time.monotonic() - self._taken_at >= 60 * minutes
        return WANTED if late or self._requests.pending() else NOTHING

    def due(self, step: int, *, news: int, loss: float | None) -> bool:
        """Whether a checkpoint is to be taken after this step.

        Args:
            news: the largest of all ranks' news.
            loss: of the step; None when it did not count.

        Raises:
            CheckpointError: on all ranks: more saves in a row have failed than are allowed.
        """
        if loss is not None:
            self._losses.append(loss)
        if news == FAILED:
            with raised_together(self._mesh):
                if self._failures:
                    raise self._failures[-1]
        every = self._settings.every_steps
        return news == WANTED or (every is not None and step % every == 0)

    def save(self, step: int, *, tensors: Callable[[], Tensors], state: Mapping[str, Any], config: str, wait: bool) -> None:
        """Take a checkpoint; returns when training may go on, or with `wait` when it is whole on disk and in the store.

        Args:
            tensors: gives the training state; all ranks call it together, and rank 0's answer counts.

        Raises:
            CheckpointError: on all ranks: too many saves have failed, or this one has and was waited for.
        """
        began = time.monotonic()
        self._settle()
        gathered = tensors()
        with raised_together(self._mesh):
            if len(self._failures) > self._settings.failures_allowed:
                raise self._failures[-1]
            self._requests.met()
            if self._snapshot is not None:
                copy = self._snapshot.take(gathered)
                state = {**state, "loss": sum(self._losses) / max(1, len(self._losses))}
                waited = time.monotonic() - began
                job = self._thread.submit(self._write, step, copy, state=state, config=config, waited_s=waited)
                self._writing = (step, job)
        self._losses, self._taken_at = [], time.monotonic()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: on all ranks: it failed.
        """
        with raised_together(self._mesh):
            self._settle()
            if self._failures:
                raise self._failures[-1]

    def close(self) -> None:
        """Let the save under way end, whatever comes of it: the run has failed, and this is what it will go on from."""
        self._settle()
        self._thread.shutdown()

    def _settle(self) -> None:
        """Wait for the save under way, if there is one, and tell what came of it."""
        if self._writing is None:
            return
        (step, job), self._writing = self._writing, None
        try:
            detail = job.result()
        except ClipscaleError as error:
            self._failures.append(error)
            print(f"checkpoint of step {step}: {error}", file=sys.stderr, flush=True)
            self._tell("checkpoint_failed", step=step, detail=str(error))
        else:
            self._failures = []
            self._tell("checkpoint", step=step, detail=detail)

    def _write(self, step: int, copy: Tensors, *, state: Mapping[str, Any], config: str, waited_s: float) -> str:
        """The work of the thread; returns what there is to say of it."""
        began = time.monotonic()
        try:
            path = save(self._folder, step=step, tensors=copy, state=state, config=config)
            size = sum(file.stat().st_size for file in path.iterdir())
            remove_others(self._folder, self._settings, newest=step)
            if self._store is not None:
                self._store.put(path)
                self._store.remove_others(self._settings, newest=step)
        except ClipscaleError:
            raise
        except Exception as error:
            raise CheckpointError(f"the checkpoint of step {step} failed: {type(error).__name__}: {error}") from error
        return f"{size / 1e6:,.1f} MB in {time.monotonic() - began:.2f} s, for which training waited {waited_s:.3f} s"
