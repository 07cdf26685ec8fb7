"""From sources to batches: every rank's rows of every global batch, and of every evaluation set.

A training batch is a function of its number alone, so a worker needs no state: torch's DataLoader asks its workers for
batch numbers in turn and hands them over in order. b rows on this rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipscale.data.order import BLOCK, Order
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
    ) -> None:
        opened = {name: source.open() for name, source in sources.items()}
        self._order = make_order(sources, opened, seed=seed, global_batch=global_batch, lanes=lanes)
        self._readers = [Reader(opened[name], inputs, cache=source.cache_decoded) for name, source in sources.items()]
        self._names = list(sources)
        self._seed_keys = torch.tensor([named_key(f"{seed}/{name}") for name in sources])
        self._kind, self._inputs, self._rank, self._world = kind, inputs, rank, world

    def __getitem__(self, number: int) -> Batch:
        rows = self._order.batch(number, rank=self._rank, world=self._world)
        seeds = combined(0, self._seed_keys[rows.source], torch.from_numpy(rows.epoch), torch.from_numpy(rows.sample))
        samples: list[Decoded | BadSample | None] = [None] * len(seeds)
        for place, reader in enumerate(self._readers):
            mine = np.flatnonzero(rows.source == place).tolist()
            for row, sample in zip(mine, reader.read([(int(rows.shard[row]), int(rows.place[row])) for row in mine]), strict=True):
                samples[row] = sample
        return self._batch(samples, seeds, rows.source)

    def _batch(self, samples: Sequence[Decoded | BadSample | None], seeds: Tensor, source: np.ndarray) -> Batch:
        good = [sample if isinstance(sample, Decoded) else None for sample in samples]
        captions = [
            "" if sample is None else choose_caption(sample.captions, seed) for sample, seed in zip(good, seeds.tolist(), strict=True)
        ]
        return Batch(
            kind=self._kind,
            inputs=collate(good, captions, self._inputs),
            captions=captions,
            caption_ids=torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),
            keys=["" if sample is None else sample.key for sample in samples],
            seeds=seeds,
            valid=torch.tensor([sample is not None for sample in good]),
            bad=[
                BadSample(bad.key, self._names[int(place)], bad.reason)
                for bad, place in zip(samples, source, strict=True)
                if isinstance(bad, BadSample)
            ],
        )


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
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's rows of global batches `start_batch`, `start_batch + 1`, ...: without end, the same for any world and workers.

    `workers` are forked processes; 0 reads in this one. Rows of a global batch go to the ranks in equal runs.

    Raises:
        ConfigError: the global batch cannot be shared out equally.
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
    return iter(loader)


def _outlive_stop_signals(_worker: int) -> None:
    """Schedulers signal whole process groups; the rank takes its checkpoint first and then ends its workers itself."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch


def make_order(
    sources: Mapping[str, Source], opened: Mapping[str, OpenSource], *, seed: int, global_batch: int, lanes: int | None
) -> Order:
    """The order of the opened sources' samples."""
    return Order(
        {name: opened[name].samples for name in sources},
        {name: source.weight for name, source in sources.items()},
        seed=seed,
        global_batch=global_batch,
        lanes=lanes,
    )


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


def recipe_hash(sources: Mapping[str, Source], *, seed: int, global_batch: int, lanes: int | None = None) -> str:
    """Fingerprint of the data and of everything that decides its order; where the data lies makes no difference."""
    recipe = {
        "sources": {name: [source.open().fingerprint, source.weight] for name, source in sources.items()},
        "order": [seed, global_batch, lanes, BLOCK],
    }
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


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
