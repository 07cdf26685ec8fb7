"""From sources to batches: every rank's rows of every global batch, and of every evaluation set.

A training batch is a function of its number alone, so a worker needs no state: torch's DataLoader asks its workers for
batch numbers in turn and hands them over in order. Where a run stands is the number of batches taken. b rows on this rank.
"""

from __future__ import annotations

import atexit
import itertools
import signal
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipscale.data import position
from clipscale.data.lengths import SampleLengths
from clipscale.data.order import Order, Rows, Start
from clipscale.data.random_numbers import combined, named_key
from clipscale.data.reader import Decoded, Reader, collate
from clipscale.data.sample import BadSample, Batch, caption_id
from clipscale.data.sources import OpenSource, Source
from clipscale.data.text import choose_caption
from clipscale.errors import ConfigError, DataError, ShardError
from clipscale.inputs import Input, Modality

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


class TrainingBatches(Dataset[Batch]):
    """This rank's rows of global batch t, for every t."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        kind: str,
        inputs: Mapping[Modality, Input],
        global_batch: int,
        seed: int,
        rank: int,
        world: int,
        lanes: int | None,
        bucket_batches: int,
        start: Start | None,
    ) -> None:
        position.check_weights(sources)
        opened = {name: source.open() for name, source in sources.items()}
        self._opened = list(opened.values())
        self.order = Order(
            {name: source.samples for name, source in opened.items()},
            {name: source.weight for name, source in sources.items()},
            later_weights=position.later_weights(sources),
            seed=seed,
            global_batch=global_batch,
            lanes=lanes,
            bucket_batches=bucket_batches,
            lengths=SampleLengths(self._opened, inputs) if bucket_batches > 1 else None,
            start=start,
        )
        self.start = start
        self.recipe = position.make_recipe(
            sources, opened, seed=seed, global_batch=global_batch, lanes=lanes, bucket_batches=bucket_batches
        )
        self._readers = [Reader(opened[name], inputs, cache=source.cache_decoded) for name, source in sources.items()]
        self._names = list(sources)
        self._seed_keys = torch.tensor([named_key(f"{seed}/{name}") for name in sources])
        self._kind, self._inputs, self._rank, self._world = kind, inputs, rank, world

    def __getitem__(self, number: int) -> Batch:
        rows = self.order.batch(number, rank=self._rank, world=self._world)
        seeds = combined(0, self._seed_keys[rows.source], torch.from_numpy(rows.epoch), torch.from_numpy(rows.sample))
        samples: list[Decoded | BadSample | None] = [None] * len(seeds)
        reading: dict[str, dict[str, float]] = {}
        for place, name in enumerate(self._names):
            mine = np.flatnonzero(rows.source == place).tolist()
            if mine:
                reading[name] = self._read(place, rows, mine, samples)
        return self._batch(samples, seeds, rows, reading)

    def _read(self, source: int, rows: Rows, mine: list[int], samples: list[Decoded | BadSample | None]) -> dict[str, float]:
        """Put one source's rows into `samples`; what that took."""
        begun, before = time.perf_counter(), dict(self._opened[source].counters)
        places = [(int(rows.shard[row]), int(rows.place[row])) for row in mine]
        for row, sample in zip(mine, self._readers[source].read(places), strict=True):
            samples[row] = sample
        after = self._opened[source].counters
        grown = {name: value - before.get(name, 0) for name, value in after.items()}
        return {"rows": len(mine), "seconds": time.perf_counter() - begun, **grown}

    def _batch(
        self, samples: Sequence[Decoded | BadSample | None], seeds: Tensor, rows: Rows, reading: dict[str, dict[str, float]]
    ) -> Batch:
        good = [sample if isinstance(sample, Decoded) else None for sample in samples]
        captions = [
            "" if sample is None else choose_caption(sample.captions, seed) for sample, seed in zip(good, seeds.tolist(), strict=True)
        ]
        inputs = collate(good, captions, self._inputs)
        return Batch(
            kind=self._kind,
            inputs=inputs,
            captions=captions,
            caption_ids=torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),
            keys=["" if sample is None else sample.key for sample in samples],
            seeds=seeds,
            valid=torch.tensor([sample is not None for sample in good]),
            bad=[self._told(bad, rows, row) for row, bad in enumerate(samples) if isinstance(bad, BadSample)],
            filled=filled(inputs),
            reading=reading,
        )

    def _told(self, bad: BadSample, rows: Rows, row: int) -> BadSample:
        """With its key, the source's name in the run, and where it lies."""
        source, shard, place = (int(column[row]) for column in (rows.source, rows.shard, rows.place))
        opened = self._opened[source]
        try:
            key = opened.key(shard, place)
        except ShardError:  # which the reason tells
            key = bad.key
        return BadSample(key, self._names[source], bad.reason, f"shard {opened.shards[shard]}, sample {place}")


def filled(inputs: Mapping[Modality, Mapping[str, Tensor]]) -> dict[Modality, tuple[int, int]]:
    """Of speech and text: places that hold something, and all places, padding included."""
    counts: dict[Modality, tuple[int, int]] = {}
    if "speech" in inputs:
        waveform, length = inputs["speech"]["waveform"], inputs["speech"]["length"]
        counts["speech"] = int(length.sum()), waveform.numel()
    if "text" in inputs:
        mask = inputs["text"]["mask"]
        counts["text"] = int(mask.sum()), mask.numel()
    return counts


class TrainingStream(Iterator[Batch]):
    """One pair kind's batches on this rank, one after the other without end; it knows where it stands."""

    def __init__(self, batches: TrainingBatches, loader: DataLoader[Batch], *, start_batch: int) -> None:
        self.order = batches.order
        self._recipe, self._start = batches.recipe, batches.start
        self.taken = start_batch
        """Global batches taken, counted over the whole run."""
        self._loader = loader
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:  # now, and not before: this starts the workers
            self._batches = iter(self._loader)
            atexit.register(_end_workers, weakref.ref(self))
        batch = next(self._batches)
        self.taken += 1
        return batch

    def close(self) -> None:
        """End the workers; a stream that nothing refers to any more does it by itself."""
        self._batches = None

    def state(self) -> dict[str, Any]:
        """Where it stands, for the checkpoint."""
        return position.state(self._recipe, self.order, batches=self.taken, start=self._start)

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through by the batches taken."""
        return self.order.epochs(self.taken)


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
) -> TrainingStream:
    """This rank's rows of global batches `start_batch`, `start_batch + 1`, ...: without end, the same for any world and workers.

    `workers` are forked processes; 0 reads in this one. Rows of a global batch go to the ranks in equal runs. With `bucket_batches`
    above 1, rows of so many global batches are regrouped by length. `start` is the order's beginning, after a change of the data.

    Raises:
        ConfigError: the global batch cannot be shared out equally, or no source has a weight.
        DataError: a source is missing, incomplete, empty or lacks a modality.
    """
    if global_batch % world:
        below = global_batch // world * world
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of {world} ranks; nearest that fit: {below or world}, {below + world}"
        )
    batches = TrainingBatches(
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
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_From(start_batch),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_outlive_stop_signals,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws from it, and would from the global one
    )
    return TrainingStream(batches, loader, start_batch=start_batch)


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
    """`training_batches` from where a checkpoint's `TrainingStream.state()` stands, or from the start without one.

    Raises:
        DataError: the checkpoint is of other data, and `allow_change` is not given.
    """
    start_batch, start = 0, None
    order: dict[str, Any] = {"global_batch": global_batch, "seed": seed, "lanes": lanes, "bucket_batches": bucket_batches}
    if saved is not None:
        opened = {name: source.open() for name, source in sources.items()}
        start_batch, start = position.take_up(saved, position.make_recipe(sources, opened, **order), kind=kind, allow_change=allow_change)
    return training_batches(sources, kind=kind, start_batch=start_batch, start=start, **order, **settings)


def _outlive_stop_signals(_worker: int) -> None:
    """Schedulers signal whole process groups; the rank takes its checkpoint first and then ends its workers itself."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch


def check_sources(sources: Mapping[str, Source], *, kind: str, modalities: Sequence[Modality]) -> dict[str, OpenSource]:
    """The sources, opened, after making sure that each can feed this pair kind.

    Raises:
        DataError: there are none; or one is missing, incomplete or empty, or samples in it lack a modality.
    """
    if not sources:
        raise DataError(f"pair kind '{kind}' has no sources; name at least one data set under its `sources`")
    opened = {name: source.open() for name, source in sources.items()}
    for name, source in opened.items():
        for modality in modalities:
            samples, having = int(source.totals["samples"]), int(source.totals[_COUNTED_AS[modality]])
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
