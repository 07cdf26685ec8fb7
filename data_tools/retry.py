"""Retry: the rows of a data set that failed, tried again; what succeeds stands in new shards behind the others.

Shards that stand are not touched. `failed.parquet` holds the rows; it is named in the index that its shards were added to, so that a
kill between the two makes no row come twice: the same command then only writes down what still fails.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet

from clipscale.data.shards import ShardInfo, read_about, write_index
from clipscale.errors import DataError, RunError
from data_tools.build import run_jobs
from data_tools.claim import read_about as read_request
from data_tools.fetch.fetching import Fetching
from data_tools.finish import FAILED, failed_rows, write_failed_rows
from data_tools.output import Output, open_output
from data_tools.packing import LIMITS, Packing
from data_tools.plan import Plan, load_plan, read_plan, write_plan
from data_tools.rows import Row
from data_tools.shard_job import Failure, ShardJob, ShardResult, read_mark
from data_tools.tally import Progress

_FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class RetrySummary:
    """What a retry came to."""

    tried: int
    samples: int
    shards: list[str]
    """Names of the shards that were added."""
    failures: dict[str, int]
    """How many rows failed again, by reason."""


def retry(
    folder: Path | str,
    *,
    workers: int | None = None,
    fetching: Fetching | None = None,
    scratch: Path | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> RetrySummary:
    """Try the failed rows of a data set again; `scratch` is where shards wait for their upload to a store.

    Raises:
        DataError: there is no whole data set that was built here.
        RunError: the disk is full, or a process died; the data set is as it was, and the same command goes on.
    """
    place = open_output(folder, scratch=scratch)
    about = read_request(place)
    if about is None or "index.parquet" not in place.sizes():
        raise DataError(f"data set {folder}: there is no whole data set that clipscale-shards build made; run the build to its end first")
    try:
        with place.claimed(None):
            digest = _sha256(place)
            if digest and _about_index(place).get("retried") == digest:
                _take_over(place)  # killed between the index and this
                if digest == _sha256(place):
                    raise DataError(
                        f"data set {folder}: the rows in {FAILED} were tried already, and the list of what still failed is lost; "
                        f"remove {FAILED}"
                    )
                digest = _sha256(place)
            if not digest:
                return RetrySummary(0, 0, [], {})
            return _Retry(place, Packing.model_validate(about["packing"]), digest).run(workers, fetching or Fetching(), show)
    except OSError as error:
        raise RunError(f"retrying in {folder}: {error}. The data set is as it was: run the same command again") from error


@dataclass(frozen=True)
class _Retry:
    place: Output
    packing: Packing
    digest: str
    """Of failed.parquet."""

    def run(self, workers: int | None, fetching: Fetching, show: Callable[[Progress, int], None] | None) -> RetrySummary:
        place, shards = self.place, _index(self.place)
        first = max(int(shard.shard) for shard in shards) + 1
        plan = write_plan(place.plan, _rows(_fetched(place, FAILED)), self.packing)
        jobs = [
            ShardJob(place, first + number, rows, fingerprint, self.packing, first=first)
            for number, (rows, fingerprint) in enumerate(zip(plan.shard_rows, plan.fingerprints, strict=True))
        ]
        workers = 1 if place.url.startswith("memory:") else workers
        results = run_jobs(jobs, plan, workers=workers, fetching=fetching, show=show)
        self._stage(plan, first)
        added = [result.shard for result in results if result.shard]
        if added:
            write_index(place.folder, [*shards, *added], about={**_about_index(place), "retried": self.digest})
            place.publish("sizes.json", "index.sha256", "index.parquet")
        _take_over(place)
        return _summary(plan, added, results)

    def _stage(self, plan: Plan, first: int) -> None:
        """Write what still fails beside its final place."""
        place, numbers = self.place, range(len(plan.shard_rows))
        still = (row for number in numbers for row in failed_rows(read_plan(plan.path, number), self._failures(first + number)))
        if not write_failed_rows(place.folder / _staged(FAILED), still):
            (place.folder / _staged(FAILED)).write_bytes(b"")
        place.publish(_staged(FAILED))
        before = (place.read(_FAILURES) or b"").decode().splitlines()
        lines = [line for line in before if json.loads(line)["reason"] in LIMITS]
        more = (failure for number in numbers for failure in self._failures(first + number))
        place.write_lines(_staged(_FAILURES), [*lines, *(json.dumps(asdict(failure), ensure_ascii=False) for failure in more)])

    def _failures(self, shard: int) -> list[Failure]:
        mark = read_mark(self.place, shard)
        return mark.failures if mark else []


def _summary(plan: Plan, added: list[ShardInfo], results: list[ShardResult]) -> RetrySummary:
    reasons = sum((result.reasons for result in results), Counter[str]())
    return RetrySummary(sum(plan.shard_rows), sum(shard.samples for shard in added), [shard.shard for shard in added], dict(reasons))


def _rows(path: Path) -> Iterator[Row]:
    for number in range(len(load_plan(path).shard_rows)):
        yield from read_plan(path, number)


def _fetched(place: Output, name: str) -> Path:
    path = place.fetch(name)
    if path is None:
        raise FileNotFoundError(f"{name} is gone")
    return path


def _index(place: Output) -> list[ShardInfo]:
    with pyarrow.parquet.ParquetFile(_fetched(place, "index.parquet"), pre_buffer=False) as file:
        return [ShardInfo(**row) for row in file.read(use_threads=False).to_pylist()]


def _about_index(place: Output) -> dict[str, str]:
    return read_about(_fetched(place, "index.parquet").parent)


def _staged(name: str) -> str:
    return f".{name}.tmp-0"


def _take_over(place: Output) -> None:
    """Let what was staged stand; an empty file stands for none."""
    for name in (_FAILURES, FAILED):
        size = place.sizes().get(_staged(name))
        if size:
            place.rename(_staged(name), name)
        elif size == 0:
            place.remove(name)
            place.remove(_staged(name))


def _sha256(place: Output) -> str:
    """Of failed.parquet; empty when there is none."""
    data = place.read(FAILED)
    return "" if data is None else hashlib.sha256(data).hexdigest()
