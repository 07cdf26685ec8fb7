"""The job that builds one shard of a plan; doing it twice, or after any kill, gives the same bytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clipscale.data.shards import ShardInfo, ShardWriter, finished_shard
from clipscale.errors import DataError, ShardError
from data_tools.images import pack_image
from data_tools.media import read_medium
from data_tools.packing import BadRow, Packing
from data_tools.plan import read_plan
from data_tools.pool import Count, Progress
from data_tools.rows import Row
from data_tools.speech import pack_speech

_MAX_TEXT_BYTES = 1 << 19  # of captions and record together; readers refuse 1 MiB


@dataclass(frozen=True)
class ShardJob:
    """One shard to build."""

    output: Path
    work: Path
    """Folder of the plan and of the lists of failures, removed when the data set is whole."""
    number: int
    rows: int
    fingerprint: str
    packing: Packing

    @property
    def shard(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Failure:
    """A row that did not become a sample."""

    row: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardResult:
    """What came of a job; no shard when every row failed. The failures themselves stay on disk."""

    number: int
    shard: ShardInfo | None
    reasons: Counter[str]
    """How many rows failed, by reason."""
    reused: bool


class _NothingToWrite(Exception):
    """Every row failed."""


def build_shard(job: ShardJob, count: Count) -> ShardResult:
    """Build the shard, unless it stands already; its failures are written down last, which marks the job as done."""
    failures = read_failures(job.work, job.number)
    if failures is not None:
        info = finished_shard(job.output, job.shard, plan=job.fingerprint)
        if info or len(failures) == job.rows:
            count(Progress(job.rows, len(failures)))
            return ShardResult(job.number, info, _reasons(failures), reused=True)
    info, failures = _write(job, count)
    write_lines(_failures_path(job.work, job.number), [json.dumps([asdict(failure) for failure in failures])])
    return ShardResult(job.number, info, _reasons(failures), reused=False)


def read_failures(work: Path, number: int) -> list[Failure] | None:
    """The rows of a shard that failed; None when its job is not done."""
    path = _failures_path(work, number)
    return [Failure(**failure) for failure in json.loads(path.read_text())] if path.exists() else None


def _failures_path(work: Path, number: int) -> Path:
    return work / f"{number:06d}.json"


def _reasons(failures: Sequence[Failure]) -> Counter[str]:
    return Counter(failure.reason for failure in failures)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file that stands under its name only when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(job: ShardJob, count: Count) -> tuple[ShardInfo | None, list[Failure]]:
    failures: list[Failure] = []
    try:
        with ShardWriter(job.output, job.shard, plan=job.fingerprint) as writer:
            for index, row in enumerate(read_plan(job.work / "plan.parquet", job.number)):
                try:
                    size = _write_row(writer, f"{job.number:06d}{index:06d}", row, job.packing)
                    count(Progress(1, 0, size))
                except BadRow as error:
                    failures.append(Failure(row.name, error.reason, error.detail))
                    count(Progress(1, 1, 0))
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
    captions = clean_captions(row.captions)
    if not captions:
        raise BadRow("no caption", "it is empty" if row.captions else "there is none")
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


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Captions with single spaces and no control characters; empty ones and repetitions are dropped."""
    cleaned = (" ".join("".join(char if char >= " " else " " for char in caption).split()) for caption in captions)
    return list(dict.fromkeys(caption for caption in cleaned if caption))
