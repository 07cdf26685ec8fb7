"""Checks of a run's data: each source opens, its sidecars and samples can be read and decoded, and how long its store takes to answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial

from clipscale.config import Run
from clipscale.data.reader import Reader, decode
from clipscale.data.sample import BadSample
from clipscale.data.sources import OpenSource, Source, StreamedSource
from clipscale.doctor.finding import Finding, asked
from clipscale.errors import DataError, ShardError
from clipscale.inputs import Input, Modality

_SLOW_S = 0.25


def data(run: Run, inputs: Mapping[Modality, Input], *, quick: bool) -> list[Finding]:
    """A finding for every source of every pair kind; `quick` only opens them."""
    return [
        asked(f"source {name}", partial(_source, f"source {name}", source, {modality: inputs[modality] for modality in kind.modalities}))
        if not quick
        else asked(f"source {name}", partial(_opens, f"source {name}", source))
        for kind in run.pair_kinds.values()
        for name, source in kind.sources.items()
    ]


def _opens(name: str, source: Source) -> Finding:
    try:
        opened = source.open_stream() if isinstance(source, StreamedSource) else source.open()
    except DataError as error:
        return Finding(name, "problem", str(error), "nothing can be trained on it before that")
    return Finding(name, "ok", f"{len(opened.shards):,} shards, {_samples(opened.totals)}")


def _samples(totals: Mapping[str, float]) -> str:
    return f"{int(totals['samples']):,} samples" if "samples" in totals else "samples are counted as they are read"


def _source(name: str, source: Source, inputs: Mapping[Modality, Input]) -> Finding:
    """Opens it, and decodes a sample of its first, middle and last shard."""
    opening = _opens(name, source)
    if opening.state == "problem":
        return opening
    try:
        times = list(_streamed(source, inputs) if isinstance(source, StreamedSource) else _indexed(source.open(), inputs))
    except ShardError as error:
        return Finding(name, "problem", str(error), "`clipscale-shards verify` says what else is damaged; copy or build these shards again")
    found = f"{opening.found}; a sample takes {statistics.median(times) * 1000:,.1f} ms to read and decode"
    if statistics.median(times) <= _SLOW_S:
        return Finding(name, "ok", found)
    return Finding(name, "warning", found, "raise `workers`, or keep its tars on this machine: cache: {folder: ...}")


def _indexed(opened: OpenSource, inputs: Mapping[Modality, Input]) -> Iterator[float]:
    """Seconds for each sample that was decoded; the time of its shard's sidecar stands in the first of that shard.

    Raises:
        ShardError: a sidecar or a sample cannot be read.
    """
    usable = [shard for shard in range(len(opened.shards)) if opened.samples[shard]]
    reader = Reader(opened, inputs, cache=False)
    for shard in sorted({usable[0], usable[len(usable) // 2], usable[-1]}):
        begun = time.perf_counter()
        (sample,) = reader.read([(shard, 0)])
        if isinstance(sample, BadSample):
            raise ShardError(f"{opened.url}: shard {opened.shards[shard]}: sample '{sample.key}' cannot be read: {sample.reason}")
        yield time.perf_counter() - begun


def _streamed(source: StreamedSource, inputs: Mapping[Modality, Input]) -> Iterator[float]:
    begun = time.perf_counter()
    opened = source.open_stream()
    sample = next(opened.read_shard(0), None)
    if sample is None or isinstance(sample, BadSample):
        raise ShardError(f"{opened.url}: nothing can be read from {opened.shards[0]}: {sample.reason if sample else 'it is empty'}")
    decode(sample, inputs)
    yield time.perf_counter() - begun
