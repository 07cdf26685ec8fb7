"""Batches of indexed sources: a function of their number, so that a worker needs no state.

b rows on this rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from clipscale.data import position
from clipscale.data.batching import make_batch
from clipscale.data.lengths import SampleLengths
from clipscale.data.order import Order, Rows, Start
from clipscale.data.random_numbers import combined, named_key
from clipscale.data.reader import Decoded, Reader
from clipscale.data.sample import BadSample, Batch
from clipscale.data.sources import Source
from clipscale.errors import ShardError
from clipscale.inputs import Input, Modality

_UNREAD = BadSample("", "", "not read")


class IndexedBatches(Dataset[Batch]):
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
        samples: list[Decoded | BadSample] = [_UNREAD] * len(seeds)
        reading: dict[str, dict[str, float]] = {}
        for place, name in enumerate(self._names):
            mine = np.flatnonzero(rows.source == place).tolist()
            if mine:
                reading[name] = self._read(place, rows, mine, samples)
        told = [self._told(sample, rows, row) if isinstance(sample, BadSample) else sample for row, sample in enumerate(samples)]
        return make_batch(told, seeds, kind=self._kind, inputs=self._inputs, reading=reading)

    def _read(self, source: int, rows: Rows, mine: list[int], samples: list[Decoded | BadSample]) -> dict[str, float]:
        """Put one source's rows into `samples`; what that took."""
        begun, before = time.perf_counter(), dict(self._opened[source].counters)
        places = [(int(rows.shard[row]), int(rows.place[row])) for row in mine]
        for row, sample in zip(mine, self._readers[source].read(places), strict=True):
            samples[row] = sample
        after = self._opened[source].counters
        grown = {name: value - before.get(name, 0) for name, value in after.items()}
        return {"rows": len(mine), "seconds": time.perf_counter() - begun, **grown}

    def _told(self, bad: BadSample, rows: Rows, row: int) -> BadSample:
        """With its key, the source's name in the run, and where it lies."""
        source, shard, place = (int(column[row]) for column in (rows.source, rows.shard, rows.place))
        opened = self._opened[source]
        try:
            key = opened.key(shard, place)
        except ShardError:  # which the reason tells
            key = bad.key
        return BadSample(key, self._names[source], bad.reason, f"shard {opened.shards[shard]}, sample {place}")
