"""The shard format: webdataset tars whose parquet sidecars say where every sample lies.

```text
DATASET/
  000000.tar       USTAR, plain webdataset: KEY.jpg|png|webp  KEY.flac|wav  KEY.txt  KEY.json, one sample's members together
  000000.parquet   the sidecar: one row a sample, see tables.SIDECAR; written last, so a shard is whole when it has one
  index.parquet    one row a shard, see tables.INDEX
  sizes.json       {"000000.tar": samples}, as open_clip and CLAP read it
  index.sha256     checksums of these two, as sha256sum writes them
```

The same samples always give the same bytes. `KEY.txt` is the first caption; `KEY.json` holds all `captions` and
whatever else is known (label, intent, slots, speaker, transcript, ...). Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow
import pyarrow.parquet

from clipscale.data.dataset import DatasetIndex
from clipscale.data.media import IMAGE_SUFFIXES, SPEECH_SUFFIXES, image_size, image_suffix, speech_length, speech_suffix
from clipscale.data.opening import open_dataset, read_member
from clipscale.data.sample import Sample, parse_sample
from clipscale.data.tables import INDEX, KEY, SHARD_NAME, SIDECAR, read_parquet
from clipscale.errors import DataError, ShardError

_BLOCK = 512
_END = 20 * _BLOCK  # tars end with zeros up to a multiple of this
_WORTH_JOINING = 1 << 16  # bytes: copying so many takes no longer than hashing and writing small parts one by one
_WRITTEN_AT_ONCE = 1 << 20  # bytes; several samples


@dataclass(frozen=True)
class ShardInfo:
    """One whole shard: a row of index.parquet."""

    shard: str
    samples: int
    tar_bytes: int
    sha256: bytes
    sidecar_sha256: bytes
    images: int
    recordings: int
    captions: int
    seconds: float


class ShardWriter:
    """Writes `FOLDER/SHARD.tar` and its sidecar; under their final names only when both are whole.

    Use it as a context manager: after `with ShardWriter(folder, "000000") as writer:` the shard stands and
    `writer.info` is its row for `write_index`; when the body raises, nothing is left.
    """

    info: ShardInfo

    def __init__(self, folder: Path, shard: str, *, plan: str = "") -> None:
        """`plan` is any text that says what the shard should hold; `finished_shard` compares it."""
        if not KEY.fullmatch(shard):
            raise DataError(f"shard name '{shard}': only letters, digits, _ and - are allowed, at most 80")
        self._folder, self._shard, self._plan = folder, shard, plan
        self._temporary = aside(folder / f"{shard}.tar")
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._hash = hashlib.sha256()
        self._position = 0
        self._file = self._temporary.open("wb", buffering=_WRITTEN_AT_ONCE)

    def write(
        self,
        key: str,
        *,
        captions: Sequence[str],
        image: bytes | None = None,
        speech: bytes | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a sample; `captions` are put into its record.

        Raises:
            DataError: a key that is not allowed or comes twice, no caption, or no medium.
            ShardError: a medium that is not what the format holds, or whose header is damaged.
        """
        self._check(key, captions, image, speech)
        row = media_columns(image, speech)
        fields = {**(record or {}), "captions": list(captions)}
        text = _record_text(fields)
        members = (
            ("image", row["image_suffix"], image),
            ("speech", row["speech_suffix"], speech),
            ("text", "txt", captions[0].encode()),
            ("record", "json", text.encode()),
        )
        row["captions"], row["status"] = len(captions), "ok"
        self._append(key, row, members)

    def copy(self, key: str, row: Mapping[str, Any], data: bytes) -> None:
        """Append a sample of another shard under this key, its members byte for byte.

        Args:
            row: its row in that shard's sidecar.
            data: its bytes in that tar, headers included.

        Raises:
            DataError: a key that is not allowed or comes twice.
        """
        self._check_key(key)
        suffixes = {"image": row["image_suffix"], "speech": row["speech_suffix"], "text": "txt", "record": "json"}
        members = []
        for member, suffix in suffixes.items():
            begin, size = int(row[f"{member}_offset"]) - int(row["offset"]), int(row[f"{member}_bytes"])
            members.append((member, suffix, data[begin : begin + size] if size else None))
        self._append(key, {name: row[name] for name in SIDECAR.names}, members)

    def _check_key(self, key: str) -> None:
        if not KEY.fullmatch(key):
            raise DataError(f"key '{key}': only letters, digits, _ and - are allowed, at most 80")
        if key in self._keys:
            raise DataError(f"key '{key}' comes twice in shard {self._shard}")

    def _check(self, key: str, captions: Sequence[str], image: bytes | None, speech: bytes | None) -> None:
        self._check_key(key)
        if not captions or not all(caption.strip() for caption in captions):
            raise DataError(f"sample '{key}' has no caption, or an empty one")
        if image is None and speech is None:
            raise DataError(f"sample '{key}' has neither an image nor speech")

    def _append(self, key: str, row: dict[str, Any], members: Iterable[tuple[str, str, bytes | None]]) -> None:
        """Append a sample: `row` without its places, and members as (name in the sidecar, suffix, bytes)."""
        parts, end = list[bytes](), self._position
        for member, suffix, data in members:
            if data is not None:
                size = len(data)
                parts += (_header(f"{key}.{suffix}", size), data, b"\0" * (-size % _BLOCK))
                row[f"{member}_offset"], row[f"{member}_bytes"] = end + _BLOCK, size
                end += _BLOCK + _padded(size)
        start, crc32 = self._position, 0
        for part in [b"".join(parts)] if end - start < _WORTH_JOINING else parts:
            self._put(part)
            crc32 = zlib.crc32(part, crc32)
        self._keys.add(key)
        row["key"], row["offset"], row["bytes"], row["crc32"] = key, start, end - start, crc32
        self._rows.append(row)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            try:
                self._file.close()
            finally:  # closing writes what is left, and fails when the disk is full
                self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        end = self._position + 2 * _BLOCK
        self._put(b"\0" * (-(-end // _END) * _END - self._position))
        _sync(self._file.flush, self._file.fileno())
        sidecar = self._folder / f"{self._shard}.parquet"
        sidecar.unlink(missing_ok=True)
        self._temporary.replace(self._folder / f"{self._shard}.tar")
        about = {"plan": self._plan, "sha256": self._hash.hexdigest(), "bytes": str(self._position)}
        write_parquet(sidecar, pyarrow.Table.from_pylist(self._rows, schema=SIDECAR.with_metadata(about)))
        self.info = read_shard_info(sidecar)


def _header(name: str, size: int) -> bytes:
    """A member's USTAR header, as tarfile writes it in ten times the time: only name, size and checksum differ from member to member."""
    if size >= 8**11:
        raise ShardError(f"{name} has {size} bytes; a member of a tar has less than 8 GiB")
    named, sized = name.encode(), b"%011o" % size
    checksum = _REST_SUM + sum(named) + sum(sized)
    return b"%b%b%b\0%b%06o\0 %b" % (named.ljust(100, b"\0"), _BEFORE_SIZE, sized, _BEFORE_CHECKSUM, checksum, _AFTER_CHECKSUM)


def _template() -> bytes:
    header = tarfile.TarInfo()
    header.mode, header.uname, header.gname = 0o444, "clipscale", "clipscale"
    return header.tobuf(tarfile.USTAR_FORMAT)


_HEADER = _template()
_BEFORE_SIZE, _BEFORE_CHECKSUM, _AFTER_CHECKSUM = _HEADER[100:124], _HEADER[136:148], _HEADER[156:]
_REST_SUM = sum(_BEFORE_SIZE + _BEFORE_CHECKSUM + _AFTER_CHECKSUM) + 8 * ord(" ")  # the checksum's own place counts as spaces
_record_text = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


_NO_MEDIA: dict[str, Any] = {name: 0 for name in SIDECAR.names if name.endswith(("_offset", "_bytes"))} | {
    "width": 0,
    "height": 0,
    "image_suffix": "",
    "frames": 0,
    "sample_rate": 0,
    "speech_suffix": "",
}


def media_columns(image: bytes | None, speech: bytes | None) -> dict[str, Any]:
    """A sidecar's columns for these media, as their headers tell; where they lie is zero.

    Raises:
        ShardError: a medium that is not what the format holds, or whose header is damaged.
    """
    row = _NO_MEDIA.copy()
    if image is not None:
        row["width"], row["height"] = image_size(image)
        row["image_suffix"] = image_suffix(image)
    if speech is not None:
        row["frames"], row["sample_rate"] = speech_length(speech)
        row["speech_suffix"] = speech_suffix(speech)
    row["sha256"] = hashlib.sha256((image or b"") + (speech or b"")).digest()
    return row


def finished_shard(folder: Path, shard: str, *, plan: str) -> ShardInfo | None:
    """The shard when it is whole, undamaged and made for the same plan; else None, and it must be written (again)."""
    sidecar, tar = folder / f"{shard}.parquet", folder / f"{shard}.tar"
    try:
        about = _about(sidecar)
        if about.get("plan") != plan or about.get("bytes") != str(tar.stat().st_size):
            return None
        with tar.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about.get("sha256"):
                return None
        return read_shard_info(sidecar)
    except (OSError, pyarrow.ArrowException):
        return None


def write_index(folder: Path, shards: Sequence[ShardInfo], *, about: Mapping[str, str] | None = None) -> None:
    """Write `index.parquet`, `sizes.json` and their checksums over whole shards; `about` is kept in the index's metadata."""
    table = pyarrow.Table.from_pylist([vars(shard) for shard in shards], schema=INDEX.with_metadata(dict(about or {})))
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, compression="zstd")
    sizes = json.dumps({f"{shard.shard}.tar": shard.samples for shard in shards}, indent=1) + "\n"
    files = {"index.parquet": stream.getvalue(), "sizes.json": sizes.encode()}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    for name, data in (("sizes.json", files["sizes.json"]), ("index.sha256", sums.encode()), ("index.parquet", files["index.parquet"])):
        _write_whole(folder / name, partial(_write_bytes, data))  # the index last: it says that all else is there


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def read_about(folder: Path) -> dict[str, str]:
    """What `write_index` was told about the data set; empty when there is no readable index."""
    try:
        return _about(folder / "index.parquet")
    except (OSError, pyarrow.ArrowException):
        return {}


def aside(path: Path) -> Path:
    """A hidden name beside a file, for what is not whole yet; another at each call: nodes of one folder may share process numbers."""
    return path.with_name(f".{path.name}.tmp-{secrets.randbits(62)}")


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    """Write a parquet file that stands under its name only when it is whole and on disk."""
    _write_whole(path, lambda temporary: pyarrow.parquet.write_table(table, temporary, compression="zstd"))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = aside(path)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            _sync(file.flush, file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(flush: Callable[[], None], descriptor: int) -> None:
    flush()
    os.fsync(descriptor)


def _about(path: Path) -> dict[str, str]:
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items() if name != b"ARROW:schema"}


def read_shard_info(sidecar: Path) -> ShardInfo:
    """A shard's row of the index, as its sidecar tells.

    Raises:
        OSError, pyarrow.ArrowException, KeyError: it cannot be read, or is no sidecar.
    """
    about, data = _about(sidecar), sidecar.read_bytes()
    table = read_parquet(data, columns=["status", "width", "frames", "sample_rate", "captions"])
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    good = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True) if row[0] == "ok"]
    return ShardInfo(
        shard=sidecar.stem,
        samples=len(good),
        tar_bytes=int(about["bytes"]),
        sha256=bytes.fromhex(about["sha256"]),
        sidecar_sha256=hashlib.sha256(data).digest(),
        images=sum(row["width"] > 0 for row in good),
        recordings=sum(row["frames"] > 0 for row in good),
        captions=sum(row["captions"] for row in good),
        seconds=sum(row["frames"] / row["sample_rate"] for row in good if row["frames"]),
    )


__all__ = [
    "IMAGE_SUFFIXES",
    "INDEX",
    "KEY",
    "SHARD_NAME",
    "SIDECAR",
    "SPEECH_SUFFIXES",
    "DataError",
    "DatasetIndex",
    "Sample",
    "ShardError",
    "ShardInfo",
    "ShardWriter",
    "finished_shard",
    "image_size",
    "image_suffix",
    "open_dataset",
    "parse_sample",
    "read_about",
    "read_member",
    "read_shard_info",
    "media_columns",
    "speech_length",
    "speech_suffix",
    "write_index",
    "write_parquet",
]
