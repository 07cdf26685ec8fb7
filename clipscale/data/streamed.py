"""Batches of tars without an index: every reader goes through shards of its own, and a run knows which shards it has finished.

The shards of a source, permuted anew in each epoch, form one endless line. Reader i of n (workers of all ranks) takes places i, i + n, ...
of those that are not finished, so nothing is lost; but which samples meet in a batch depends on the number of readers, and after a
restart shards that were begun are read again from their start. b rows on this rank.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from clipscale.data.batching import make_batch
from clipscale.data.mix import Shares
from clipscale.data.order import permutation
from clipscale.data.random_numbers import combined, named_key
from clipscale.data.reader import Decoded, decode
from clipscale.data.sample import BadSample, Batch, Sample
from clipscale.data.sources import ShardStream, StreamedSource
from clipscale.errors import ShardError
from clipscale.inputs import Input, Modality


class Finished:
    """Places of a source's line of shards that a run has gone through: all before one, and some besides."""

    def __init__(self, before: int = 0, besides: str = "") -> None:
        self.before = before
        self.besides: set[int] = set()
        for part in filter(None, besides.split(",")):
            first, _, last = part.partition("-")
            self.besides |= set(range(int(first), int(last or first) + 1))

    def add(self, place: int) -> None:
        """Count a place; one that is counted already changes nothing."""
        if place >= self.before:
            self.besides.add(place)
        while self.before in self.besides:
            self.besides.discard(self.before)
            self.before += 1

    def left(self) -> Iterator[int]:
        """All other places as of now, without end."""
        besides = frozenset(self.besides)
        return (place for place in itertools.count(self.before) if place not in besides)

    @property
    def total(self) -> int:
        """Number of places."""
        return self.before + len(self.besides)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        runs = []
        for _, group in itertools.groupby(enumerate(sorted(self.besides)), key=lambda pair: pair[1] - pair[0]):
            places = [place for _, place in group]
            runs.append(str(places[0]) if len(places) == 1 else f"{places[0]}-{places[-1]}")
        return {"before": self.before, "besides": ",".join(runs)}


class _Reader:
    """One reader's way through its shards of one source."""

    def __init__(self, name: str, source: StreamedSource, opened: ShardStream, places: Iterator[int], *, seed: int) -> None:
        self.opened = opened
        self._key, self._places = f"{seed}/{name}", places
        self._most = source.shuffle_samples
        self._seed = torch.tensor([named_key(self._key)])
        self._waiting: list[tuple[int, Sample | BadSample]] = []
        self._in_hand: Counter[int] = Counter()
        self._read: set[int] = set()
        self._samples = self._line()
        self._drawn = np.random.Generator(np.random.Philox(0))

    def _line(self) -> Iterator[tuple[int, Sample | BadSample]]:
        """Samples with the place of their shard on the line."""
        idle = 0
        for place in self._places:
            epoch, turn = divmod(place, len(self.opened.shards))
            shard = int(permutation(f"{self._key}/shards/{epoch}", len(self.opened.shards))[turn])
            number = -1
            for number, sample in enumerate(self.opened.read_shard(shard)):
                if number == 0:
                    self._begin(place)
                self._in_hand[place] += 1
                yield place, sample
            self._read.add(place)
            idle = 0 if number >= 0 else idle + 1
            if idle > len(self.opened.shards):
                raise ShardError(f"{self.opened.url}: no sample in {idle} tars one after the other")

    def _begin(self, place: int) -> None:
        """What is drawn depends on the shard alone."""
        key = named_key(f"{self._key}/shuffle/{place}") & (1 << 64) - 1
        self._drawn = np.random.Generator(np.random.Philox(key))

    def next(self) -> tuple[int, Sample | BadSample]:
        """The next sample in random order, with its shard's place on the line."""
        while len(self._waiting) < self._most:
            self._waiting.append(next(self._samples))
        chosen = int(self._drawn.integers(len(self._waiting)))
        self._waiting[chosen], taken = self._waiting[-1], self._waiting[chosen]
        self._waiting.pop()
        self._in_hand[taken[0]] -= 1
        return taken

    def seed_of(self, place: int, sample: Sample | BadSample) -> int:
        """Key of a sample's augmentation: from its epoch and its own key."""
        epoch = torch.tensor([place // len(self.opened.shards)])
        return int(combined(0, self._seed, epoch, torch.tensor([named_key(sample.key)])))

    def finished(self) -> list[int]:
        """Places whose samples have all been handed out since this was last asked."""
        done = [place for place in self._read if not self._in_hand[place]]
        for place in done:
            self._read.discard(place)
            self._in_hand.pop(place, None)
        return sorted(done)


class StreamedBatches(IterableDataset[Batch]):
    """This rank's batches of un-indexed sources, from a given one on; one reader a worker."""

    def __init__(
        self,
        sources: Mapping[str, StreamedSource],
        opened: Mapping[str, ShardStream],
        *,
        kind: str,
        inputs: Mapping[Modality, Input],
        shares: Shares,
        global_batch: int,
        seed: int,
        rank: int,
        world: int,
        start_batch: int,
        finished: Mapping[str, Finished],
    ) -> None:
        self.opened, self.finished = opened, finished
        self._sources, self._kind, self._inputs, self._shares = sources, kind, inputs, shares
        self._rows, self._seed, self._rank, self._world = global_batch // world, seed, rank, world
        self._global_batch, self._start = global_batch, start_batch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine, of = self._rank * workers + worker_id, self._world * workers
        readers = [
            _Reader(name, source, self.opened[name], itertools.islice(self.finished[name].left(), mine, None, of), seed=self._seed)
            for name, source in self._sources.items()
        ]
        for number in itertools.count(self._start + worker_id, workers):
            yield self._batch(number, readers)

    def _batch(self, number: int, readers: list[_Reader]) -> Batch:
        """The rows that the mix gives this rank, drawn from this worker's readers."""
        first = number * self._global_batch + self._rank * self._rows
        counts = np.diff(self._shares.counts(np.arange(first, first + self._rows + 1, dtype=np.int64)), axis=1)
        names = list(self._sources)
        samples: list[Decoded | BadSample] = []
        seeds, reading = [], {}
        for name, reader, rows in zip(names, readers, counts.sum(axis=1).tolist(), strict=True):
            begun, before = time.perf_counter(), dict(reader.opened.counters)
            for _ in range(rows):
                place, sample = reader.next()
                samples.append(self._decoded(name, sample))
                seeds.append(reader.seed_of(place, sample))
            grown = {counter: value - before.get(counter, 0) for counter, value in reader.opened.counters.items()}
            if rows:
                reading[name] = {"rows": rows, "seconds": time.perf_counter() - begun, **grown}
        finished = {name: places for name, reader in zip(names, readers, strict=True) if (places := reader.finished())}
        return make_batch(samples, torch.tensor(seeds), kind=self._kind, inputs=self._inputs, reading=reading, finished=finished)

    def _decoded(self, name: str, sample: Sample | BadSample) -> Decoded | BadSample:
        if isinstance(sample, BadSample):
            return BadSample(sample.key, name, sample.reason, sample.where or sample.source)
        try:
            return decode(sample, self._inputs)
        except ShardError as error:
            return BadSample(sample.key, name, str(error), self.opened[name].url)


def warning(kind: str, opened: Mapping[str, ShardStream]) -> str:
    """What is lost without an index."""
    tars = ", ".join(f"'{name}' ({len(source.shards):,} tars)" for name, source in opened.items())
    return (
        f"pair kind '{kind}': {tars} have no index and are streamed. Which samples meet in a batch then depends on the number of ranks and "
        "workers; after a restart, samples of tars that were begun come again; an epoch has no exact end, lengths are not known, and a tar "
        "that was cut off between two samples looks whole. `clipscale-shards index` gives them an index, and all of that"
    )
