"""Reshard: data sets out of data sets. Merge, split, filter, other shard sizes; every member is copied byte for byte.

A plan (`.build/plan.parquet`) says which samples go into which shard, a row group each; every shard is a job of its own, written aside
and renamed when whole. After any kill the same command finishes, and the result is the same byte for byte.

Keys: out of one data set, samples keep their keys. Out of several, a key gets the place of its data set in the command in front
(`0-000017`, `1-000017`), so that keys are unique when they were unique in each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from clipscale.data.shards import KEY, DatasetIndex, Sample, ShardError, ShardInfo, ShardWriter, finished_shard, open_dataset, write_index
from clipscale.errors import DataError, RunError
from data_tools.claim import check_output, read_about
from data_tools.finish import standing
from data_tools.output import WORK, FolderOutput, Output, StoreOutput, open_output
from data_tools.pool import Count, run_all, usable_cores
from data_tools.shard_job import finish_shard, standing_shard
from data_tools.tally import Progress

_PLAN = pyarrow.schema([("source", pyarrow.int32()), ("shard", pyarrow.int32()), ("row", pyarrow.int32()), ("key", pyarrow.string())])
_READ = 64  # samples read at a time
_MEMBERS = ("image", "speech", "text", "record")

Values = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Which samples are taken."""

    holds: Callable[[Values], bool] | None = None
    """Asked of each sample's values; None takes all."""
    needs: Literal["keys", "records"] = "keys"
    """What the values are: the columns of the sidecar, or the record and captions as well."""
    about: str = ""
    """What is asked, for the fingerprint."""


@dataclass(frozen=True)
class ReshardSummary:
    """What came of it."""

    output: str
    samples: int
    shards: int
    reused_shards: int
    bytes: int


@dataclass(frozen=True)
class _Job:
    output: Output
    sources: tuple[str, ...]
    number: int
    samples: int
    fingerprint: str

    @property
    def shard(self) -> str:
        return f"{self.number:06d}"


def reshard(
    sources: Sequence[str],
    output: Path | str,
    *,
    choice: Choice | None = None,
    samples_per_shard: int = 2_000,
    workers: int | None = None,
    overwrite: bool = False,
    scratch: Path | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> ReshardSummary:
    """Make a data set of the samples of others; `scratch` is where shards wait for their upload to a store.

    Raises:
        DataError: a source cannot be opened, nothing is chosen, or `output` holds something else; nothing was written.
        RunError: a sample cannot be read, the disk is full, or a process died; finished shards are kept for the next try.
    """
    choice = choice or Choice()
    place = open_output(output, scratch=scratch)
    if any(_same_place(source, place) for source in sources):
        raise DataError(f"output {output}: it is one of the data sets to read; give another folder")
    check_output(place)
    indices = [open_dataset(source) for source in sources]
    about: dict[str, Any] = {"input": " ".join(sources), "resharded": [index.fingerprint for index in indices], "choice": choice.about}
    about |= {"samples_per_shard": samples_per_shard}
    try:
        with place.claimed(None):
            _claim(place, about, overwrite)
            there = standing(place) if isinstance(place, StoreOutput) else None  # in a folder every shard is looked at
            if there:
                return ReshardSummary(place.url, there.samples, there.shards, there.shards, there.bytes)
            sizes = _write_plan(place.plan, indices, choice, samples_per_shard)
            if not sizes:
                raise DataError(f"{about['input']}: no sample fulfils {choice.about or 'the choice'}; nothing was written")
            place.write_lines("build.json", [json.dumps(about, indent=1)])
            jobs = [
                _Job(place, tuple(sources), number, size, _fingerprint(about, number, size, place.plan))
                for number, size in enumerate(sizes)
            ]
            total = sum(sizes)
            in_memory = any(url.startswith("memory:") for url in (place.url, *sources))  # which other processes do not see
            processes = 1 if in_memory else min(workers or usable_cores(), len(jobs))
            results = list(run_all(_copy_shard, jobs, workers=processes, show=lambda progress: show(progress, total) if show else None))
            shards = [info for info, _ in sorted(results, key=lambda result: result[0].shard)]
            write_index(place.folder, shards)
            place.publish("sizes.json", "index.sha256", "index.parquet")
    except OSError as error:
        raise RunError(f"resharding into {output}: {error}. What is finished is kept: run the same command again") from error
    reused = sum(reused for _, reused in results)
    return ReshardSummary(place.url, total, len(shards), reused, sum(shard.tar_bytes for shard in shards))


def _same_place(source: str, place: Output) -> bool:
    if isinstance(place, StoreOutput):
        return source.rstrip("/") == place.url.rstrip("/")
    return Path(source.removeprefix("file://")).resolve() == place.folder.resolve()


def _claim(place: Output, about: dict[str, Any], overwrite: bool) -> None:
    """Make sure that the output is for this; another data set is removed when it may be, its index first."""
    for stray in place.folder.glob(".*.tmp-*"):
        stray.unlink()
    found = read_about(place)
    if found == about or found is None:
        return
    if not overwrite:
        raise DataError(f"output {place.url}: it holds another data set, of {found.get('input')}; give another folder, or --overwrite")
    for name in ["index.parquet", *place.sizes(), *(f"{WORK}/{number:06d}.json" for number in place.marks())]:
        place.remove(name)


def _write_plan(path: Path, indices: Sequence[DatasetIndex], choice: Choice, samples_per_shard: int) -> list[int]:
    """Samples of each shard to be; memory holds one shard's rows at a time."""
    source, sizes = _chosen(indices, choice), []
    temporary = path.with_name("new-plan.parquet")
    with pyarrow.parquet.ParquetWriter(temporary, _PLAN, compression="zstd") as writer:
        while rows := list(islice(source, samples_per_shard)):
            columns = [pyarrow.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), _PLAN, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=_PLAN), row_group_size=len(rows))
            sizes.append(len(rows))
    temporary.replace(path)
    return sizes


def _chosen(indices: Sequence[DatasetIndex], choice: Choice) -> Iterator[tuple[int, int, int, str]]:
    for source, index in enumerate(indices):
        for shard in range(len(index.shards)):
            for row, values in enumerate(sample_values(index, shard, records=choice.needs == "records" and choice.holds is not None)):
                if choice.holds is None or choice.holds(values):
                    key = f"{source}-{values['key']}" if len(indices) > 1 else str(values["key"])
                    if not KEY.fullmatch(key):
                        raise DataError(f"{index.url}: key '{values['key']}' becomes '{key}', which is longer than 80 characters")
                    yield source, shard, row, key


def sample_values(index: DatasetIndex, shard: int, *, records: bool) -> Iterator[Values]:
    """What is known of each sample of a shard: the sidecar's columns and seconds; with `records`, its record and captions too.

    Raises:
        ShardError: the sidecar or a sample cannot be read.
    """
    columns = index.sidecar(shard).columns
    count = len(columns["key"])
    for begin in range(0, count, _READ):
        rows = range(begin, min(begin + _READ, count))
        samples: Sequence[Sample | ShardError | None] = index.read(shard, rows) if records else [None] * len(rows)
        for row, sample in zip(rows, samples, strict=True):
            values: Values = {name: column[row].item() if hasattr(column[row], "item") else column[row] for name, column in columns.items()}
            values["seconds"] = values["frames"] / values["sample_rate"] if values["frames"] else 0.0
            if isinstance(sample, ShardError):
                raise sample
            if sample is not None:
                values = {**values, **sample.record, "caption": sample.captions[0], "captions": sample.captions, "key": values["key"]}
            yield values


def _fingerprint(about: dict[str, Any], number: int, size: int, plan: Path) -> str:
    """Of what a shard must hold."""
    with pyarrow.parquet.ParquetFile(plan) as file:
        rows = file.read_row_group(number, use_threads=False)
    digest = hashlib.sha256(json.dumps([about["resharded"], number, size]).encode())
    for name in ("source", "shard", "row"):
        digest.update(rows.column(name).to_numpy().tobytes())
    digest.update("\n".join(rows.column("key").to_pylist()).encode())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _opened(url: str) -> DatasetIndex:
    return open_dataset(url)


def _copy_shard(job: _Job, count: Count) -> tuple[ShardInfo, bool]:
    whole = _whole(job)
    if whole:
        count(Progress(job.samples))
        return whole, True
    with pyarrow.parquet.ParquetFile(job.output.plan) as file:
        rows = file.read_row_group(job.number, use_threads=False).to_pylist()
    with ShardWriter(job.output.folder, job.shard, plan=job.fingerprint) as writer:
        for begin in range(0, len(rows), _READ):
            for row, columns, sample in _samples(job, rows[begin : begin + _READ]):
                writer.copy(row["key"], columns, sample)
                count(Progress(1, len(sample)))
    finish_shard(job, writer.info, [])
    return writer.info, False


def _whole(job: _Job) -> ShardInfo | None:
    """The shard, when it stands: in a folder by its bytes, in a store by its mark and size."""
    if isinstance(job.output, FolderOutput):
        return finished_shard(job.output.folder, job.shard, plan=job.fingerprint)
    there = standing_shard(job)
    return there.shard if there else None


def _samples(job: _Job, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any], bytes]]:
    """Rows with their sidecar's columns and their bytes in the tar, checked."""
    for row in rows:
        index = _opened(job.sources[row["source"]])
        columns = index.sidecar(row["shard"]).columns
        data = index.read_bytes(row["shard"], row["row"])
        yield row, {name: column[row["row"]] for name, column in columns.items()}, data
