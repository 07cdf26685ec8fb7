"""The figures of a preview: from the order and the sidecars, and from reading some batches as a worker reads them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from clipscale.config import PairKind, Run
from clipscale.data.lengths import SampleLengths
from clipscale.data.order import Order
from clipscale.data.position import later_weights
from clipscale.data.sample import Batch
from clipscale.data.sources import OpenSource, ShardStream, StreamedSource
from clipscale.data.stream import check_sources, resume_batches
from clipscale.inputs import Input, Modality
from clipscale.model import Encoders

SUGGESTED_BUCKETS = 64
"""Compared with a run's own setting when that is none."""
_MOST_ROWS = 1 << 18
"""Rows whose lengths are looked up for the padding."""


@dataclass(frozen=True)
class SourceSurvey:
    """One source, over the whole run."""

    name: str
    url: str
    shards: int
    samples: int | None
    """None for tars without an index."""
    weight: float
    rows: int | None
    """Rows it gives in the run."""
    epochs: float | None


@dataclass(frozen=True)
class KindSurvey:
    """One pair kind, over the whole run."""

    name: str
    modalities: tuple[Modality, Modality]
    global_batch: int
    batches: int
    sources: list[SourceSurvey]
    weight_changes: dict[int, dict[str, float]]
    padding: dict[int, float] = field(default_factory=dict)
    """Share that is padding when rows of so many global batches are regrouped by length, padded over the whole global batch."""
    padding_of: str = ""
    """What is padded, and by which length."""
    first: list[Batch] = field(default_factory=list)
    """The first rows, as training reads them."""
    samples_per_second: float = 0.0
    """Read, decoded and collated in one process."""
    rows_read: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Of reading and decoding a row, by source."""
    bad: int = 0


def survey(run: Run, model: Encoders, *, measure_s: float) -> list[KindSurvey]:
    """Look at the data of a run; reads batches of each pair kind for about `measure_s` seconds.

    Raises:
        RequestError: data or settings are not what the run needs.
    """
    inputs = model.inputs()
    return [_kind(run, name, kind, inputs, measure_s=measure_s) for name, kind in run.pair_kinds.items()]


def _kind(run: Run, name: str, kind: PairKind, inputs: Mapping[Modality, Input], *, measure_s: float) -> KindSurvey:
    opened = check_sources(kind.sources, kind=name, modalities=kind.modalities)
    batches = math.ceil(run.steps / kind.every)
    streamed = any(isinstance(source, StreamedSource) for source in kind.sources.values())
    order = None if streamed else _order(run, kind, opened, inputs, bucket_batches=1)
    taken = {} if order is None else order.taken(batches)
    sources = [
        SourceSurvey(
            name=source_name,
            url=source.url,
            shards=len(opened[source_name].shards),
            samples=None if order is None else int(opened[source_name].totals["samples"]),
            weight=source.weight,
            rows=taken.get(source_name),
            epochs=None if order is None else order.epochs(batches)[source_name],
        )
        for source_name, source in kind.sources.items()
    ]
    by = "of the recordings" if "speech" in kind.modalities else "of the captions, by their bytes" if "text" in kind.modalities else ""
    figures = _measured(run, name, kind, inputs, measure_s=measure_s)
    return KindSurvey(
        name=name,
        modalities=kind.modalities,
        global_batch=kind.global_batch,
        batches=batches,
        sources=sources,
        weight_changes=later_weights(kind.sources),
        padding={} if streamed or not by else dict(_paddings(run, kind, opened, inputs, batches=batches)),
        padding_of=by,
        **figures,  # type: ignore[arg-type]
    )


def _order(
    run: Run, kind: PairKind, opened: Mapping[str, OpenSource | ShardStream], inputs: Mapping[Modality, Input], *, bucket_batches: int
) -> Order:
    indexed: dict[str, OpenSource] = dict(opened)  # type: ignore[arg-type]  # only called where every source has an index
    return Order(
        {name: source.samples for name, source in indexed.items()},
        {name: source.weight for name, source in kind.sources.items()},
        later_weights=later_weights(kind.sources),
        seed=run.seed,
        global_batch=kind.global_batch,
        lanes=run.lanes,
        bucket_batches=bucket_batches,
        lengths=_lengths(kind, indexed, inputs),
    )


def _lengths(kind: PairKind, opened: Mapping[str, OpenSource], inputs: Mapping[Modality, Input]) -> SampleLengths:
    return SampleLengths(list(opened.values()), {modality: inputs[modality] for modality in kind.modalities})


def _paddings(
    run: Run, kind: PairKind, opened: Mapping[str, OpenSource | ShardStream], inputs: Mapping[Modality, Input], *, batches: int
) -> Iterator[tuple[int, float]]:
    """Padding of the first batches, without and with buckets."""
    indexed: dict[str, OpenSource] = dict(opened)  # type: ignore[arg-type]
    lengths = _lengths(kind, indexed, inputs)
    suggested = min(SUGGESTED_BUCKETS, batches)
    for bucket_batches in dict.fromkeys((1, kind.bucket_batches if kind.bucket_batches > 1 else suggested)):
        order = _order(run, kind, opened, inputs, bucket_batches=bucket_batches)
        looked_at = min(batches, max(bucket_batches, _MOST_ROWS // kind.global_batch))
        used = places = 0.0
        for number in range(looked_at):
            rows = order.batch(number)
            found = np.empty(len(rows.source), dtype=np.float64)
            for source in np.unique(rows.source).tolist():
                mine = rows.source == source
                found[mine] = lengths(source, rows.shard[mine], rows.place[mine])
            used, places = used + float(found.sum()), places + float(found.max()) * len(found)
        yield bucket_batches, 1 - used / max(places, 1e-9)


def _measured(run: Run, name: str, kind: PairKind, inputs: Mapping[Modality, Input], *, measure_s: float) -> dict[str, object]:
    """Batches read in this process as one worker reads them: small ones, so that a large global batch does not take minutes."""
    rows = min(kind.global_batch, 32)
    stream = resume_batches(
        None,
        kind.sources,
        kind=name,
        modalities=kind.modalities,
        inputs=inputs,
        global_batch=rows,
        seed=run.seed,
        lanes=run.lanes,
        bucket_batches=1,
        allow_change=False,
    )
    first = next(stream)  # opens files
    begun, read, bad = time.perf_counter(), 0, 0
    took: dict[str, tuple[float, float]] = {}
    while read == 0 or time.perf_counter() - begun < measure_s:
        batch = next(stream)
        read, bad = read + rows, bad + len(batch.bad)
        for source, reading in batch.reading.items():
            own, seconds = took.get(source, (0.0, 0.0))
            took[source] = own + reading["rows"], seconds + reading["seconds"]
    return {
        "first": [first],
        "samples_per_second": read / (time.perf_counter() - begun),
        "rows_read": read,
        "milliseconds": {source: 1000 * seconds / own for source, (own, seconds) in took.items()},
        "bad": bad + len(first.bad),
    }
