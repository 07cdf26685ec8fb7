"""The plan: which row goes into which shard, written down as parquet before any shard is.

Shard i is row group i of the plan, so any process can build any shard alone, and no process holds more than one shard's
rows. Each shard's fingerprint says what it must hold: the rows, the sizes of their files, and the packing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from clipscale import __version__
from data_tools.packing import Packing
from data_tools.rows import Medium, Row, TarMember

_MEDIUM = pyarrow.struct(
    [
        ("path", pyarrow.binary()),
        ("bytes", pyarrow.binary()),
        ("member", pyarrow.string()),  # of the tar at the path; with its place:
        ("offset", pyarrow.int64()),
        ("size", pyarrow.int64()),
        ("crc32", pyarrow.int64()),
    ]
)
_PLAN = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("image", _MEDIUM),
        ("speech", _MEDIUM),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("record", pyarrow.string()),  # JSON
        ("problem", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    path: Path
    shard_rows: list[int]
    """Rows of each shard."""
    fingerprints: list[str]
    """Of each shard; the same wherever and whenever the input was copied."""
    image_bytes: int
    """Of all image files: what a data set that keeps them as they are will need at least."""
    dates: str
    """Fingerprint of when the files were changed last."""

    @property
    def fingerprint(self) -> str:
        """Of the whole data set."""
        return hashlib.sha256("\n".join(self.fingerprints).encode()).hexdigest()


def write_plan(path: Path, rows: Iterable[Row], packing: Packing) -> Plan:
    """Write the plan of `rows`; memory holds one shard's rows at a time."""
    shard_rows, fingerprints, image_bytes, dates = [], [], 0, hashlib.sha256()
    salt = f"{__version__} {packing.model_dump_json()}".encode()
    source = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, _PLAN, compression="zstd") as writer:
        while shard := list(islice(source, packing.samples_per_shard)):
            digest = hashlib.sha256(salt)
            for row in shard:
                digest.update(_identity(row))
                image_bytes += _size(row.image)
                dates.update(repr([_changed(row.image), _changed(row.speech)]).encode())
            fingerprints.append(digest.hexdigest())
            writer.write_table(pyarrow.Table.from_pylist([_values(row) for row in shard], schema=_PLAN), row_group_size=len(shard))
            shard_rows.append(len(shard))
    return Plan(path, shard_rows, fingerprints, image_bytes, dates.hexdigest())


def read_plan(path: Path, shard: int) -> Iterator[Row]:
    """The rows of one shard."""
    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read_row_group(shard, use_threads=False)
    for batch in table.to_batches(max_chunksize=256):
        for values in batch.to_pylist():
            yield Row(
                values["name"],
                _from_medium(values["image"]),
                _from_medium(values["speech"]),
                tuple(values["captions"]),
                json.loads(values["record"]),
                values["problem"],
            )


def _values(row: Row) -> dict[str, Any]:
    return {
        "name": _clean(row.name),
        "image": _medium(row.image),
        "speech": _medium(row.speech),
        "captions": [_clean(caption) for caption in row.captions],
        "record": _clean(json.dumps(dict(row.record), sort_keys=True, ensure_ascii=False)),
        "problem": _clean(row.problem),
    }


def _clean(text: str) -> str:
    """The text without half characters, which file names and JSON can hold but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _medium(medium: Medium | None) -> dict[str, Any] | None:
    if isinstance(medium, bytes):
        return {"bytes": medium}
    if isinstance(medium, TarMember):
        place = {"offset": medium.offset, "size": medium.size, "crc32": medium.crc32}
        return {"path": os.fsencode(medium.tar.absolute()), "member": _clean(medium.name), **place}
    return None if medium is None else {"path": os.fsencode(medium.absolute())}


def _from_medium(value: dict[str, Any] | None) -> Medium | None:
    if value is None:
        return None
    if value["path"] is None:
        return bytes(value["bytes"])
    path = Path(os.fsdecode(value["path"]))
    if value["member"] is None:
        return path
    return TarMember(path, value["member"], value["offset"], value["size"], value["crc32"])


def _identity(row: Row) -> bytes:
    """What a sample is made of, without where its files lie."""
    media = [_medium_identity(row.image), _medium_identity(row.speech)]
    return json.dumps([row.name, media, row.captions, dict(row.record), row.problem], sort_keys=True).encode()


def _medium_identity(medium: Medium | None) -> Any:
    if isinstance(medium, bytes):
        return hashlib.sha256(medium).hexdigest()
    if isinstance(medium, TarMember):
        return [medium.size, medium.crc32]
    state = _stat(medium)
    return None if medium is None else state.st_size if state else "missing"


def _size(medium: Medium | None) -> int:
    if isinstance(medium, bytes):
        return len(medium)
    if isinstance(medium, TarMember):
        return medium.size
    state = _stat(medium)
    return state.st_size if state else 0


def _changed(medium: Medium | None) -> int:
    state = None if isinstance(medium, bytes) else _stat(medium.tar if isinstance(medium, TarMember) else medium)
    return state.st_mtime_ns if state else 0


def _stat(path: Path | None) -> os.stat_result | None:
    try:
        return path.stat() if path else None
    except (OSError, ValueError):
        return None
