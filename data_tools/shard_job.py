"""The job that builds one shard of a plan; doing it twice, or after any kill, gives the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from clipscale.data.shards import ShardInfo, ShardWriter, finished_shard
from clipscale.errors import DataError, ShardError
from data_tools.captions import pack_captions
from data_tools.fetch.store import forget, with_bodies
from data_tools.images import pack_image
from data_tools.media import read_medium
from data_tools.output import WORK, Output, StoreOutput
from data_tools.packing import BadRow, Packing
from data_tools.plan import read_plan
from data_tools.pool import Count
from data_tools.rows import Row
from data_tools.speech import pack_speech
from data_tools.tally import Progress

_MAX_TEXT_BYTES = 1 << 19  # of captions and record together; readers refuse 1 MiB


@dataclass(frozen=True)
class ShardJob:
    """One shard to build."""

    output: Output
    number: int
    rows: int
    fingerprint: str
    packing: Packing
    first: int = 0
    """Number of the plan's first shard: not 0 where shards are added to a data set."""

    @property
    def group(self) -> int:
        """Where its rows stand in the plan."""
        return self.number - self.first

    @property
    def shard(self) -> str:
        return f"{self.number:06d}"

    @property
    def work(self) -> Path:
        """The folder of the plan and of what is fetched, on this machine."""
        return self.output.plan.parent


@dataclass(frozen=True)
class Failure:
    """A row that did not become a sample."""

    row: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardResult:
    """What came of a job; no shard when every row failed. The failures themselves stay in its mark."""

    number: int
    shard: ShardInfo | None
    reasons: Counter[str]
    """How many rows failed, by reason."""
    reused: bool


@dataclass(frozen=True)
class Mark:
    """What a finished job leaves in the work folder: which plan it was for, its shard, and the rows that failed."""

    plan: str
    shard: ShardInfo | None
    failures: list[Failure]

    def result(self, number: int, *, reused: bool) -> ShardResult:
        return ShardResult(number, self.shard, Counter(failure.reason for failure in self.failures), reused)

    def line(self) -> str:
        """As JSON."""
        shard = self.shard and {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(self.shard).items()}
        return json.dumps({"plan": self.plan, "shard": shard, "failures": [asdict(failure) for failure in self.failures]})


class PlannedShard(Protocol):
    """A shard that a plan asks for."""

    @property
    def output(self) -> Output: ...
    @property
    def number(self) -> int: ...
    @property
    def shard(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


class _NothingToWrite(Exception):
    """Every row failed."""


def build_shard(job: ShardJob, count: Count) -> ShardResult:
    """Build the shard, unless it stands already; its mark is written last, and says that the job is done."""
    standing = standing_shard(job)
    if standing:
        count(Progress(job.rows, reasons=standing.reasons))
        forget(job.work, job.number)
        return standing
    info, failures = _write(job, count)
    result = finish_shard(job, info, failures)
    forget(job.work, job.number)
    return result


def finish_shard(job: PlannedShard, info: ShardInfo | None, failures: list[Failure]) -> ShardResult:
    """Let a shard that was written stand in the output, and mark its job as done."""
    if info:
        job.output.publish(f"{job.shard}.tar", f"{job.shard}.parquet")
    mark = Mark(job.fingerprint, info, failures)
    job.output.write_lines(_mark_name(job.number), [mark.line()])
    return mark.result(job.number, reused=False)


def standing_shard(job: PlannedShard) -> ShardResult | None:
    """What came of a job that is done already, and undamaged; else None."""
    mark = read_mark(job.output, job.number)
    whole = mark is not None and mark.plan == job.fingerprint and _stands(job, mark)
    return mark.result(job.number, reused=True) if mark and whole else None


def _stands(job: PlannedShard, mark: Mark) -> bool:
    """Whether the shard is there and undamaged; in a store only whether it has its size, since reading it would be fetching it."""
    if mark.shard is None:
        return True
    if isinstance(job.output, StoreOutput):
        return job.output.size(f"{job.shard}.tar") == mark.shard.tar_bytes and job.output.size(f"{job.shard}.parquet") is not None
    return finished_shard(job.output.folder, job.shard, plan=job.fingerprint) == mark.shard


def read_mark(output: Output, number: int) -> Mark | None:
    """What the job of a shard has left; None when it is not done."""
    data = output.read(_mark_name(number))
    if data is None:
        return None
    values = json.loads(data)
    shard = values["shard"]
    if shard:
        shard |= {name: bytes.fromhex(shard[name]) for name in ("sha256", "sidecar_sha256")}
    return Mark(values["plan"], shard and ShardInfo(**shard), [Failure(**failure) for failure in values["failures"]])


def _mark_name(number: int) -> str:
    return f"{WORK}/{number:06d}.json"


def _write(job: ShardJob, count: Count) -> tuple[ShardInfo | None, list[Failure]]:
    failures: list[Failure] = []
    try:
        with ShardWriter(job.output.folder, job.shard, plan=job.fingerprint) as writer:
            for index, row in enumerate(with_bodies(read_plan(job.output.plan, job.group), job.work, job.number)):
                try:
                    size = _write_row(writer, f"{job.number:06d}{index:06d}", row, job.packing)
                    count(Progress(1, size))
                except BadRow as error:
                    failures.append(Failure(row.name, error.reason, error.detail))
                    count(Progress(1, reasons={error.reason: 1}))
            if len(failures) == job.rows:
                raise _NothingToWrite
    except _NothingToWrite:
        return None, failures
    return writer.info, failures


@dataclass(frozen=True)
class PackedRow:
    """A row as it is packed."""

    captions: list[str]
    image: bytes | None
    speech: bytes | None


def pack_row(row: Row, packing: Packing) -> PackedRow:
    """What is packed of a row.

    Raises:
        BadRow: it cannot become a sample, or shall not.
    """
    if row.problem:
        reason, _, detail = row.problem.partition(": ")
        raise BadRow(reason, detail)
    captions = pack_captions(row.captions, packing)
    if len(json.dumps([captions, dict(row.record)])) > _MAX_TEXT_BYTES:
        raise BadRow("too much text", f"captions and fields together have more than {_MAX_TEXT_BYTES} bytes")
    if row.image is None and row.speech is None:
        raise BadRow("no image or recording", "the row names no file")
    image = None if row.image is None else pack_image(read_medium(row.image), packing)
    speech = None if row.speech is None else pack_speech(read_medium(row.speech), packing)
    return PackedRow(captions, image, speech)


def _write_row(writer: ShardWriter, key: str, row: Row, packing: Packing) -> int:
    """Bytes of the media written."""
    packed = pack_row(row, packing)
    try:
        writer.write(key, captions=packed.captions, image=packed.image, speech=packed.speech, record=row.record)
    except (ShardError, DataError) as error:
        raise BadRow("refused by the shard format", str(error)) from error
    return len(packed.image or b"") + len(packed.speech or b"")
