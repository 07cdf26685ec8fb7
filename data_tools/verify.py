"""Verify a data set: every byte against its checksums, every medium decoded; what is damaged is named by shard, key and reason.

```text
index.sha256 -> index.parquet, sizes.json -> NNNNNN.tar, NNNNNN.parquet -> samples (crc32) -> media (sha256, decoded)
```

A flipped bit or a missing byte anywhere in these files breaks one of the sums, so it is found for certain; the sidecars then say which
sample it lies in. `quick` reads no tar: it finds missing and cut files and everything wrong with the index and the sidecars.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow
import pyarrow.parquet

from clipscale.data.shards import (
    INDEX,
    SHARD_NAME,
    SIDECAR,
    image_size,
    image_suffix,
    open_dataset,
    parse_sample,
    speech_length,
    speech_suffix,
)
from clipscale.errors import DataError, ShardError
from data_tools.images import check_image
from data_tools.packing import BadRow
from data_tools.pool import Count, run_all, usable_cores
from data_tools.speech import check_recording
from data_tools.summed import SummedFile
from data_tools.tally import Progress

_MEMBERS = ("image", "speech", "text", "record")
_SUMS = "index.sha256"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written."""

    file: str
    key: str
    """The sample; empty when it concerns the whole file."""
    reason: str
    """One of a few: what findings are counted by."""
    detail: str

    def line(self) -> str:
        """For people."""
        return f"{self.file}{f' {self.key}' if self.key else ''}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What was looked at."""

    samples: int
    shards: int
    bytes: int
    reasons: Counter[str]
    """Findings, by reason."""


@dataclass(frozen=True)
class _ShardCheck:
    url: str
    row: dict[str, Any]
    """Of index.parquet."""
    quick: bool

    @property
    def tar(self) -> str:
        return f"{self.row['shard']}.tar"

    @property
    def sidecar(self) -> str:
        return f"{self.row['shard']}.parquet"


def verify(
    url: str,
    *,
    found: Callable[[Finding], None],
    quick: bool = False,
    workers: int | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> Verification:
    """Check the data set at `url`; `found` is told of everything that is wrong.

    Raises:
        DataError: there is no data set to check.
    """
    reasons, total = Counter[str](), 0

    def note(finding: Finding) -> None:
        reasons[finding.reason] += 1
        found(finding)

    files = _files(url)
    for finding in _check_sums(url, files):
        note(finding)
    rows = _index_rows(url, note)
    listed = {f"{row['shard']}{suffix}" for row in rows for suffix in (".tar", ".parquet")}
    for name in sorted(set(files) - listed - {"index.parquet"}) if rows else []:
        if name.endswith(".tar"):
            note(Finding(name, "", "not listed", "index.parquet does not know it, but readers of plain tars would read it"))
    total = sum(row["samples"] for row in rows)
    checks = [_ShardCheck(url, row, quick) for row in rows]
    for findings in run_all(
        _check_shard,
        checks,
        workers=min(workers or usable_cores(), max(1, len(checks))),
        show=lambda progress: show(progress, total) if show else None,
    ):
        for finding in findings:
            note(finding)
    return Verification(total, len(rows), 0 if quick else sum(row["tar_bytes"] for row in rows), reasons)


def _files(url: str) -> dict[str, int]:
    """The data set's files and their sizes."""
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        files = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in filesystem.ls(root, detail=True)}
    except (OSError, ValueError, ImportError) as error:
        open_dataset(url)  # says what is wrong with the address
        raise DataError(f"data set {url}: the folder cannot be listed: {error}") from error
    if "index.parquet" not in files and not any(name.endswith(".parquet") for name in files):
        open_dataset(url)  # says what is there instead
    return files


def _open(url: str, name: str) -> BinaryIO:
    return fsspec.open(f"{url.rstrip('/')}/{name}", "rb").open()  # type: ignore[no-any-return]


def _read(url: str, name: str) -> bytes:
    with _open(url, name) as file:
        return file.read()


def _check_sums(url: str, files: Sequence[str] | dict[str, int]) -> Iterator[Finding]:
    """The index and sizes.json against index.sha256, written as `sha256sum` writes."""
    for name in ("index.parquet", "sizes.json", _SUMS):
        if name not in files:
            yield Finding(name, "", "missing file", "it is not there; `clipscale-shards index` or the same build command writes it again")
    if _SUMS not in files:
        return
    lines = _read(url, _SUMS).decode("ascii", "replace")
    found = re.fullmatch(r"([0-9a-f]{64})  index\.parquet\n([0-9a-f]{64})  sizes\.json\n", lines)
    if not found:
        yield Finding(_SUMS, "", "damaged file", "it does not hold two checksums")
        return
    for name, digest in zip(("index.parquet", "sizes.json"), found.groups(), strict=True):
        if name in files and hashlib.sha256(_read(url, name)).hexdigest() != digest:
            yield Finding(name, "", "changed file", f"its sha256 is not the one in {_SUMS}: one of the two was changed")


def _index_rows(url: str, note: Callable[[Finding], None]) -> list[dict[str, Any]]:
    """The rows of index.parquet; those that its sidecars tell when it cannot be read."""
    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(_read(url, "index.parquet")), pre_buffer=False) as file:
            table = file.read(use_threads=False)
        if not table.schema.equals(INDEX, check_metadata=False):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        rows: list[dict[str, Any]] = table.to_pylist()
        if bad := next((row["shard"] for row in rows if not SHARD_NAME.fullmatch(row["shard"])), None):
            raise ValueError(f"it names shard '{bad}'")
    except FileNotFoundError:
        return []
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        note(Finding("index.parquet", "", "unreadable file", f"{str(error)[:200]}; the shards were not checked"))
        return []
    return rows


def _check_shard(check: _ShardCheck, count: Count) -> list[Finding]:
    try:
        columns, findings = _check_sidecar(check)
        findings += _check_size(check) if check.quick else _check_tar(check, columns, count)
    except FileNotFoundError as error:
        name = check.tar if check.tar in str(error) else check.sidecar
        findings = [Finding(name, "", "missing file", "index.parquet lists it")]
    except OSError as error:
        findings = [Finding(check.tar, "", "unreadable file", str(error)[:200])]
    reasons = Counter(finding.reason for finding in findings)
    count(Progress(check.row["samples"] if check.quick else 0, reasons=reasons))
    return findings


def _check_sidecar(check: _ShardCheck) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The sidecar's rows, as far as they can be believed, and what is wrong with it."""
    data = _read(check.url, check.sidecar)
    if hashlib.sha256(data).digest() != check.row["sidecar_sha256"]:
        return [], [Finding(check.sidecar, "", "changed file", "its sha256 is not the one in index.parquet: it was damaged or cut off")]
    with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), pre_buffer=False) as file:
        table = file.read(use_threads=False)
    if missing := set(SIDECAR.names) - set(table.column_names):
        return [], [Finding(check.sidecar, "", "unreadable file", f"it lacks the columns {sorted(missing)}")]
    rows: list[dict[str, Any]] = table.to_pylist()
    findings = _contradictions(check, rows)
    twice = [key for key, number in Counter(row["key"] for row in rows).items() if number > 1]
    findings += [Finding(check.sidecar, key, "duplicate key", "it comes twice in the shard") for key in twice]
    return rows, findings


def _contradictions(check: _ShardCheck, rows: list[dict[str, Any]]) -> list[Finding]:
    """Where the index says something else of the shard than its sidecar."""
    good = [row for row in rows if row["status"] == "ok"]
    told = {
        "samples": len(good),
        "images": sum(row["width"] > 0 for row in good),
        "recordings": sum(row["frames"] > 0 for row in good),
        "captions": sum(row["captions"] for row in good),
        "seconds": sum(row["frames"] / row["sample_rate"] for row in good if row["frames"]),
    }
    return [
        Finding("index.parquet", "", "wrong count", f"{name} of shard {check.row['shard']}: {check.row[name]}, its sidecar says {value}")
        for name, value in told.items()
        if abs(check.row[name] - value) > 1e-6 * max(1.0, abs(value))
    ]


def _check_size(check: _ShardCheck) -> list[Finding]:
    filesystem, root = fsspec.core.url_to_fs(check.url)
    found = filesystem.size(f"{root.rstrip('/')}/{check.tar}")
    return [] if found == check.row["tar_bytes"] else [_wrong_size(check, found)]


def _wrong_size(check: _ShardCheck, found: int) -> Finding:
    return Finding(check.tar, "", "wrong size", f"it has {found:,} bytes, index.parquet says {check.row['tar_bytes']:,}")


def _check_tar(check: _ShardCheck, rows: list[dict[str, Any]], count: Count) -> list[Finding]:
    """One pass over the tar: its sum, each sample's sum, each medium decoded."""
    findings: list[Finding] = []
    with _open(check.url, check.tar) as file:
        tar = SummedFile(file)
        for row in sorted(rows, key=lambda row: int(row["offset"])):
            if row["offset"] < tar.position:
                findings.append(Finding(check.sidecar, row["key"], "overlapping samples", f"it begins at {row['offset']}, inside another"))
                continue
            tar.skip_to(row["offset"])
            reason, detail = _sample_damage(row, tar.read(row["bytes"]))
            if reason:
                findings.append(Finding(check.tar, row["key"], reason, detail))
            count(Progress(1, row["bytes"]))
        tar.finish()
    if tar.position != check.row["tar_bytes"]:
        findings.insert(0, _wrong_size(check, tar.position))
    elif tar.digest() != check.row["sha256"]:
        where = "in the samples named below" if findings else "outside its samples" if rows else "somewhere"
        findings.insert(0, Finding(check.tar, "", "changed file", f"its sha256 is not the one in index.parquet; the damage lies {where}"))
    return findings


def _sample_damage(row: dict[str, Any], data: bytes) -> tuple[str, str]:
    """Reason and detail; empty when nothing is wrong. A sample that was left out when the shard was made is not decoded."""
    if len(data) < row["bytes"]:
        return "cut off", f"the file ends after {len(data):,} of its {row['bytes']:,} bytes"
    if zlib.crc32(data) != row["crc32"]:
        return "changed bytes", f"its {row['bytes']:,} bytes at {row['offset']:,} are not those that were written"
    if row["status"] != "ok":
        return "", ""
    members = {name: _member(row, data, name) for name in _MEMBERS}
    try:
        return _media_damage(row, members)
    except (ShardError, json.JSONDecodeError) as error:
        return "unreadable sample", str(error)
    except BadRow as error:
        return error.reason, error.detail


def _member(row: dict[str, Any], data: bytes, name: str) -> bytes | None:
    size, begin = row[f"{name}_bytes"], row[f"{name}_offset"] - row["offset"]
    return data[begin : begin + size] if size else None


def _media_damage(row: dict[str, Any], members: dict[str, bytes | None]) -> tuple[str, str]:
    image, speech = members["image"], members["speech"]
    if hashlib.sha256((image or b"") + (speech or b"")).digest() != row["sha256"]:
        return "changed bytes", "its media are not those whose sha256 the sidecar holds"
    sample = parse_sample(row["key"], **members)
    told: dict[str, Any] = {"captions": len(sample.captions)}
    if image is not None:
        check_image(image)
        told |= dict(zip(("width", "height"), image_size(image), strict=True)) | {"image_suffix": image_suffix(image)}
    if speech is not None:
        check_recording(speech)
        told |= dict(zip(("frames", "sample_rate"), speech_length(speech), strict=True)) | {"speech_suffix": speech_suffix(speech)}
    wrong = {name: (row[name], value) for name, value in told.items() if row[name] != value}
    return ("wrong sidecar", f"(said, found): {wrong}") if wrong else ("", "")
