"""From sources to batches: every rank's rows of every global batch, and of every evaluation set.

Of indexed sources a training batch is a function of its number alone, so a worker needs no state: torch's DataLoader asks its
workers for batch numbers in turn and hands them over in order. Where a run stands is the number of batches taken. b rows on this rank.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from clipscale.data import position
from clipscale.data.indexed import IndexedBatches
from clipscale.data.order import Start
from clipscale.data.reader import Decoded, Reader, collate
from clipscale.data.sample import BadSample, Batch
from clipscale.data.sources import OpenSource, ShardStream, Source, StreamedSource
from clipscale.data.streamed import Finished, StreamedBatches, warning
from clipscale.errors import ConfigError, DataError, ShardError
from clipscale.inputs import Input, Modality
from clipscale.signals import end_with_parent, outlive_stop_signals

PREFETCH = 4
"""Batches each worker prepares ahead."""
_COUNTED_AS = {"image": "images", "speech": "recordings", "text": "captions"}


@dataclass(frozen=True)
class EvaluationBatch:
    """Some rows of an evaluation set, all readable."""

    rows: Tensor
    """int64 [b]: which rows of the data set, counted over its shards in stored order."""
    inputs: dict[Modality, dict[str, Tensor]]
    """As in clipscale/inputs.py; text is each sample's first caption."""
    keys: list[str]
    captions: list[list[str]]
    records: list[dict[str, Any]]


class TrainingStream(Iterator[Batch], ABC):
    """One pair kind's batches on this rank, one after the other without end; it knows where it stands."""

    def __init__(self, batches: Dataset[Batch], *, start_batch: int, workers: int, pin_memory: bool) -> None:
        self.taken = start_batch
        """Global batches taken, counted over the whole run."""
        self.waited_s = 0.0
        """How long the last batch was waited for."""
        self._loader: DataLoader[Batch] = DataLoader(
            batches,
            batch_size=None,
            sampler=None if isinstance(batches, IterableDataset) else _From(start_batch),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_belong_to_rank,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context="fork" if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader draws from it, and would from the global one
        )
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:  # now, and not before: this starts the workers
            self._batches = iter(self._loader)
            atexit.register(_end_workers, weakref.ref(self))
        begun = time.perf_counter()
        batch = next(self._batches)
        self.waited_s = time.perf_counter() - begun
        self.taken += 1
        self.note(batch.finished)
        return batch

    def close(self) -> None:
        """End the workers; a stream that nothing refers to any more does it by itself."""
        self._batches = None

    def note(self, finished: Mapping[str, Sequence[int]]) -> None:
        """Hear of shards that some rank has finished, by source; only un-indexed sources need to."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where it stands, for the checkpoint."""

    @abstractmethod
    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through by the batches taken."""


class IndexedStream(TrainingStream):
    """Batches in an order that depends on nothing but the seed."""

    def __init__(self, batches: IndexedBatches, **settings: Any) -> None:
        super().__init__(batches, **settings)
        self.order = batches.order
        self._recipe, self._start = batches.recipe, batches.start

    def state(self) -> dict[str, Any]:
        return position.state(self._recipe, self.order.taken(self.taken), batches=self.taken, start=self._start)

    def epochs(self) -> dict[str, float]:
        return self.order.epochs(self.taken)


class UnindexedStream(TrainingStream):
    """Batches of tars without an index; it stands where shards are finished."""

    def __init__(self, batches: StreamedBatches, recipe: position.Recipe, **settings: Any) -> None:
        super().__init__(batches, **settings)
        self._recipe, self._tars = recipe, batches

    def note(self, finished: Mapping[str, Sequence[int]]) -> None:
        for name, places in finished.items():
            for place in places:
                self._tars.finished[name].add(place)

    def state(self) -> dict[str, Any]:
        shards = {name: finished.total for name, finished in self._tars.finished.items()}
        finished = {name: finished.state() for name, finished in self._tars.finished.items()}
        return {**position.state(self._recipe, shards, batches=self.taken, start=None), "finished": finished}

    def epochs(self) -> dict[str, float]:
        return {name: finished.total / len(self._tars.opened[name].shards) for name, finished in self._tars.finished.items()}


def _end_workers(stream: weakref.ref[TrainingStream]) -> None:
    """At the interpreter's end, before multiprocessing would wait for workers that its SIGTERM does not end."""
    if (open_stream := stream()) is not None:
        open_stream.close()


class _From(Sampler[int]):
    """Batch numbers from the first one on, without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def training_batches(
    sources: Mapping[str, Source],
    *,
    kind: str,
    modalities: tuple[Modality, Modality],
    inputs: Mapping[Modality, Input],
    global_batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start_batch: int = 0,
    lanes: int | None = None,
    bucket_batches: int = 1,
    start: Start | None = None,
    pin_memory: bool = False,
) -> IndexedStream:
    """This rank's rows of global batches `start_batch`, `start_batch + 1`, ...: without end, the same for any world and workers.

    `workers` are forked processes; 0 reads in this one. Rows of a global batch go to the ranks in equal runs. With `bucket_batches`
    above 1, rows of so many global batches are regrouped by length. `start` is the order's beginning, after a change of the data.

    Raises:
        ConfigError: the global batch cannot be shared out equally, or no source has a weight.
        DataError: a source is missing, incomplete, empty, lacks a modality or has no index.
    """
    _check_shares(sources, global_batch=global_batch, world=world)
    batches = IndexedBatches(
        sources,
        kind=kind,
        inputs={modality: inputs[modality] for modality in modalities},
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        world=world,
        lanes=lanes,
        bucket_batches=bucket_batches,
        start=start,
    )
    return IndexedStream(batches, start_batch=start_batch, workers=workers, pin_memory=pin_memory)


def _check_shares(sources: Mapping[str, Source], *, global_batch: int, world: int) -> None:
    position.check_weights(sources)
    if global_batch % world:
        below = global_batch // world * world
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of {world} ranks; nearest that fit: {below or world}, {below + world}"
        )


def resume_batches(
    saved: Mapping[str, Any] | None,
    sources: Mapping[str, Source],
    *,
    kind: str,
    global_batch: int,
    seed: int,
    lanes: int | None,
    bucket_batches: int,
    allow_change: bool,
    **settings: Any,
) -> TrainingStream:
    """Batches from where a checkpoint's `TrainingStream.state()` stands, or from the start without one; else as `training_batches`.

    Sources without an index are streamed.

    Raises:
        DataError: the checkpoint is of other data, and `allow_change` is not given; or only some of the sources have an index.
    """
    order: dict[str, Any] = {"global_batch": global_batch, "seed": seed, "lanes": lanes, "bucket_batches": bucket_batches}
    opened = open_sources(sources, kind=kind)
    recipe = position.make_recipe(sources, opened, **order)
    if saved is not None:
        position.check(saved, recipe, kind=kind, allow_change=allow_change)
    if any(isinstance(source, StreamedSource) for source in sources.values()):
        return _stream_tars(saved, sources, opened, recipe, kind=kind, global_batch=global_batch, seed=seed, **settings)
    start_batch, start = position.take_up(saved, recipe) if saved is not None else (0, None)
    return training_batches(sources, kind=kind, start_batch=start_batch, start=start, **order, **settings)


def _stream_tars(
    saved: Mapping[str, Any] | None,
    sources: Mapping[str, Any],
    opened: Mapping[str, Any],
    recipe: position.Recipe,
    *,
    kind: str,
    modalities: tuple[Modality, Modality],
    inputs: Mapping[Modality, Input],
    global_batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> UnindexedStream:
    _check_shares(sources, global_batch=global_batch, world=world)
    if recipe["bucket_batches"] > 1:
        raise ConfigError(f"pair kind '{kind}': bucket_batches needs lengths, which only an index tells; set it to 1, or index the tars")
    start_batch, finished = position.finished_shards(saved, recipe)
    if rank == 0:
        print(warning(kind, opened), file=sys.stderr)
    batches = StreamedBatches(
        sources,
        opened,
        kind=kind,
        inputs={modality: inputs[modality] for modality in modalities},
        shares=position.shares(sources, global_batch=global_batch),
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        world=world,
        start_batch=start_batch,
        finished={name: Finished(**finished.get(name, {})) for name in sources},
    )
    return UnindexedStream(batches, recipe, start_batch=start_batch, workers=workers, pin_memory=pin_memory)


def _belong_to_rank(_worker: int) -> None:
    """The rank takes its checkpoint first and then ends its workers itself; when it is killed, they go with it."""
    outlive_stop_signals()
    rank = multiprocessing.parent_process()
    assert rank is not None
    assert rank.pid is not None
    end_with_parent(rank.pid)


def _unchanged(batch: Any) -> Any:
    return batch


def open_sources(sources: Mapping[str, Source], *, kind: str) -> dict[str, OpenSource | ShardStream]:
    """The sources of a pair kind, opened.

    Raises:
        DataError: one is missing, incomplete or empty; or only some of them have an index.
    """
    without = [name for name, source in sources.items() if isinstance(source, StreamedSource)]
    if without and len(without) < len(sources):
        raise DataError(
            f"pair kind '{kind}': {', '.join(without)} are tars without an index, the other sources have one; they do not mix: "
            "index them (clipscale-shards index), or give them a pair kind of their own"
        )
    return {name: source.open_stream() if isinstance(source, StreamedSource) else source.open() for name, source in sources.items()}


def check_sources(sources: Mapping[str, Source], *, kind: str, modalities: Sequence[Modality]) -> dict[str, OpenSource | ShardStream]:
    """The sources, opened, after making sure that each can feed this pair kind, as far as an index tells.

    Raises:
        DataError: there are none; or one is missing, incomplete or empty, or samples in it lack a modality.
    """
    if not sources:
        raise DataError(f"pair kind '{kind}' has no sources; name at least one data set under its `sources`")
    opened = open_sources(sources, kind=kind)
    for name, source in opened.items():
        for modality in modalities:
            samples, having = int(source.totals.get("samples", 0)), int(source.totals.get(_COUNTED_AS[modality], 0))
            if having < samples:
                found = f"{samples - having} of its {samples} samples have none" if having else "it holds none"
                raise DataError(f"source '{name}' of pair kind '{kind}' must give {modality}, but {found}: {source.url}")
    return opened


def evaluation_batches(
    source: Source,
    *,
    modalities: Sequence[Modality],
    inputs: Mapping[Modality, Input],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[EvaluationBatch]:
    """Batches rank, rank + world, ... of the data set in stored order: each row on exactly one rank, none padded.

    Batches are dealt whole, so that a row's neighbours, and with them the last bits of its embedding, are the same for every world.

    Raises:
        DataError: the data set is missing, incomplete or empty.
        ShardError: a sample cannot be read; evaluation leaves nothing out.
    """
    opened = source.open()
    wanted: dict[Modality, Input] = {modality: inputs[modality] for modality in modalities}
    reader = Reader(opened, wanted, cache=False)
    ends = np.cumsum(opened.samples)
    for begin in range(rank * batch_size, int(ends[-1]), world * batch_size):
        rows = np.arange(begin, min(begin + batch_size, int(ends[-1])))
        shards = np.searchsorted(ends, rows, side="right")
        places = rows - (ends - opened.samples)[shards]
        samples = [_readable(sample, opened.url) for sample in reader.read(list(zip(shards.tolist(), places.tolist(), strict=True)))]
        yield EvaluationBatch(
            rows=torch.from_numpy(rows),
            inputs=collate(samples, [sample.captions[0] for sample in samples], wanted),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            records=[sample.record for sample in samples],
        )


def _readable(sample: Decoded | BadSample, url: str) -> Decoded:
    if isinstance(sample, BadSample):
        raise ShardError(f"evaluation set {url}: sample '{sample.key}' cannot be read: {sample.reason}")
    return sample
