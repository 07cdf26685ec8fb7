"""An indexed data set, opened: its shards, and its samples read by byte offset."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow
from fsspec.implementations.local import LocalFileSystem

from clipscale.data.sample import Sample, parse_sample
from clipscale.data.tables import INDEX, SHARD_NAME, read_parquet
from clipscale.errors import DataError, MissingPackage, ShardError

OPEN_FILES = 64
"""Shard files a process keeps open for each data set."""
KEPT_PLACES = 256
"""Shards whose samples' places a process keeps in memory for each data set: 1 MB for a shard of 10,000."""
RETRY_PAUSES_S = (0.05, 0.2, 0.8)
"""Seconds before each further try of a read that failed."""
_MEMBERS = ("image", "speech", "text", "record")
_PLACES = ["key", "offset", "bytes", "crc32", *(f"{member}_{what}" for member in _MEMBERS for what in ("offset", "bytes"))]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Sidecar:
    """Where the usable samples of one shard lie; row i of every column is sample i."""

    columns: dict[str, np.ndarray]
    """As in `tables.SIDECAR`, without rows whose status is not "ok"."""

    def __len__(self) -> int:
        return len(self.columns["key"])


class DatasetIndex:
    """A data set's shards; made by `open_dataset`. Safe to use in forked workers."""

    def __init__(self, url: str, table: pyarrow.Table, *, tars: str | None = None) -> None:
        """`tars` is where the tars lie, when they do not lie beside the sidecars."""
        self.url = url
        self.tars = tars or url
        self.shards: list[str] = table.column("shard").to_pylist()
        """Shard names, without .tar, in the index's order."""
        self.samples: np.ndarray = table.column("samples").to_numpy()
        """Usable samples of each shard, int64."""
        self.tar_bytes: np.ndarray = table.column("tar_bytes").to_numpy()
        self.totals: dict[str, float] = {
            name: sum(table.column(name).to_pylist()) for name in ("samples", "tar_bytes", "images", "recordings", "captions", "seconds")
        }
        """Over the whole data set."""
        self._sidecar_sha256: list[bytes] = table.column("sidecar_sha256").to_pylist()
        hashes = b"".join([*table.column("sha256").to_pylist(), *self._sidecar_sha256])
        self.fingerprint = hashlib.sha256("\n".join(self.shards).encode() + hashes).hexdigest()
        """Hash of all its bytes, through the hashes in the index."""
        self.counters: dict[str, float] = {}
        """As in `sources.OpenSource`."""
        self._process = 0
        self._reset()

    def _reset(self) -> None:
        """Open everything anew: neither file descriptors of remote stores nor their event loops survive a fork."""
        self._process = os.getpid()
        self._filesystem, self._root = _filesystem(self.url)
        self._tar_filesystem, self._tar_root = _filesystem(self.tars)
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()
        self._places: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def sidecar(self, shard: int) -> Sidecar:
        """The sidecar of the shard at this place in the index.

        Raises:
            ShardError: it is gone, or not the one that was indexed.
        """
        return _cached(self._sidecars, shard, lambda shard: Sidecar(self._read_sidecar(shard)), size=1)

    def _where(self, shard: int) -> dict[str, np.ndarray]:
        """The columns that reading needs, keys as UTF-8 bytes."""

        def read(shard: int) -> dict[str, np.ndarray]:
            columns = self._read_sidecar(shard, [*_PLACES, "status"])
            return {name: _encoded(columns[name]) if name == "key" else columns[name] for name in _PLACES}

        return _cached(self._places, shard, read, size=KEPT_PLACES)

    def _read_sidecar(self, shard: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
        if self._process != os.getpid():
            self._reset()
        name = f"{self.shards[shard]}.parquet"
        data: bytes = _retried(lambda: self._filesystem.cat_file(f"{self._root}/{name}"), what=f"{self.url}/{name}")
        if hashlib.sha256(data).digest() != self._sidecar_sha256[shard]:
            raise ShardError(f"{self.url}/{name} is not the sidecar that index.parquet describes; build the data set again")
        table = read_parquet(data, columns=names)
        columns = {column: table.column(column).to_numpy(zero_copy_only=False) for column in table.column_names}
        good = columns["status"] == "ok"
        columns = columns if good.all() else {column: values[good] for column, values in columns.items()}
        if len(columns["key"]) != self.samples[shard] or (columns["offset"] + columns["bytes"] > self.tar_bytes[shard]).any():
            raise ShardError(f"{self.url}/{name} does not fit index.parquet; build the data set again")
        return columns

    def read(self, shard: int, rows: Sequence[int]) -> list[Sample | ShardError]:
        """The samples at these places in the shard's sidecar; a sample that cannot be read, twice, is a ShardError in its place.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        if self._process != os.getpid():
            self._reset()
        samples = self._read_once(shard, rows)
        failed = [place for place, sample in enumerate(samples) if isinstance(sample, ShardError)]
        if failed:  # a store that sent too little, or something else, may do better the second time
            for place, sample in zip(failed, self._read_once(shard, [rows[place] for place in failed]), strict=True):
                samples[place] = sample
        return samples

    def read_bytes(self, shard: int, row: int) -> bytes:
        """A sample as it lies in its tar, headers and padding included; checked against its checksum, and read again when it fails it.

        Raises:
            ShardError: it cannot be read.
        """
        if self._process != os.getpid():
            self._reset()
        columns = self._where(shard)
        span = (int(columns["offset"][row]), int(columns["bytes"][row]))
        for _ in range(2):  # a store that sent too little, or something else, may do better the second time
            data = self._read_spans(shard, [span])[0]
            if isinstance(data, ShardError):
                raise data
            if len(data) == span[1] and zlib.crc32(data) == columns["crc32"][row]:
                return data
        path, key = f"{self.tars}/{self.shards[shard]}.tar", columns["key"][row].decode()
        raise ShardError(f"{path}: sample '{key}' is not the one that was written (its checksum differs)")

    def _read_once(self, shard: int, rows: Sequence[int]) -> list[Sample | ShardError]:
        columns = self._where(shard)
        spans = [(int(columns["offset"][row]), int(columns["bytes"][row])) for row in rows]
        return [
            data if isinstance(data, ShardError) else _unpack(f"{self.tars}/{self.shards[shard]}.tar", columns, row, data)
            for row, data in zip(rows, self._read_spans(shard, spans), strict=True)
        ]

    def _read_spans(self, shard: int, spans: Sequence[tuple[int, int]]) -> Sequence[bytes | ShardError]:
        path = f"{self._tar_root}/{self.shards[shard]}.tar"
        try:
            if isinstance(self._tar_filesystem, LocalFileSystem):
                local: Sequence[bytes] = _retried(lambda: self._read_local(shard, path, spans), what=path)
                return local
            starts, ends = [start for start, _ in spans], [start + size for start, size in spans]
            remote: list[bytes] = _retried(
                lambda: self._tar_filesystem.cat_ranges([path] * len(spans), starts, ends, on_error="raise"), what=path
            )
            return remote
        except ShardError as error:
            return [error] * len(spans)

    def _read_local(self, shard: int, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        descriptor = _cached(self._files, shard, lambda _: os.open(path, os.O_RDONLY), size=OPEN_FILES, drop=os.close)
        return [os.pread(descriptor, size, start) for start, size in spans]

    def key(self, shard: int, row: int) -> str:
        """A sample's key.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        return bytes(self._where(shard)["key"][row]).decode()

    def lengths(self, shard: int, modality: str) -> np.ndarray:
        """Seconds of every sample's speech, or bytes of its first caption, float32.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        if modality != "speech":
            return self._read_sidecar(shard, ["key", "offset", "bytes", "text_bytes", "status"])["text_bytes"].astype(np.float32)
        columns = self._read_sidecar(shard, ["key", "offset", "bytes", "frames", "sample_rate", "status"])
        seconds: np.ndarray = columns["frames"] / np.maximum(columns["sample_rate"], 1)
        return seconds.astype(np.float32)

    def find(self, key: str) -> tuple[int, int]:
        """The first shard and row whose sample has this key.

        Raises:
            DataError: no sample has it.
        """
        for shard in range(len(self.shards)):
            rows = np.flatnonzero(self._where(shard)["key"] == key.encode())
            if len(rows):
                return shard, int(rows[0])
        raise DataError(f"{self.url} holds no sample with the key '{key}'")

    def suffix(self, shard: int, row: int, member: str) -> str:
        """`jpg`, `flac`, ... of a sample's `image` or `speech`; empty when it has none."""
        return str(self.sidecar(shard).columns[f"{member}_suffix"][row])


def _encoded(texts: np.ndarray) -> np.ndarray:
    """Texts as bytes of one length: a tenth of the memory."""
    encoded: np.ndarray = np.array([text.encode() for text in texts], dtype=np.bytes_)
    return encoded


def _unpack(path: str, columns: dict[str, np.ndarray], row: int, data: bytes) -> Sample | ShardError:
    key = columns["key"][row].decode()
    if len(data) != columns["bytes"][row]:
        return ShardError(f"{path}: the file ends inside sample '{key}'")
    if zlib.crc32(data) != columns["crc32"][row]:
        return ShardError(f"{path}: sample '{key}' is not the one that was written (its checksum differs)")
    start = int(columns["offset"][row])
    members: dict[str, bytes | None] = {}
    for member in _MEMBERS:
        size = int(columns[f"{member}_bytes"][row])
        begin = int(columns[f"{member}_offset"][row]) - start
        members[member] = data[begin : begin + size] if size else None
    try:
        return parse_sample(key, **members)
    except ShardError as error:
        return ShardError(f"{path}: {error}")


def _cached(
    cache: OrderedDict[int, Value],
    key: int,
    make: Callable[[int], Value],
    *,
    size: int,
    drop: Callable[[Value], object] = lambda _: None,
) -> Value:
    """The value from a cache of the `size` most recently used."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    cache[key] = value = make(key)
    if len(cache) > size:
        drop(cache.popitem(last=False)[1])
    return value


def _retried(read: Callable[[], Value], *, what: str, pauses_s: tuple[float, ...] = RETRY_PAUSES_S) -> Value:
    try:
        return read()
    except FileNotFoundError:
        raise ShardError(f"{what} is gone since the data set was opened") from None
    except OSError as error:
        if not pauses_s:
            raise ShardError(f"{what} cannot be read, after {len(RETRY_PAUSES_S) + 1} tries: {error}") from error
    time.sleep(pauses_s[0])
    return _retried(read, what=what, pauses_s=pauses_s[1:])


def _filesystem(url: str) -> tuple[Any, str]:
    if url.startswith("pipe:"):
        raise DataError(
            f"{url}: pipe: addresses run shell commands and are refused; give a folder or an fsspec address such as s3://bucket/folder"
        )
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(f"{url}: {error}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error
    return filesystem, root.rstrip("/")


def open_dataset(url: str | Path, *, tars: str | None = None) -> DatasetIndex:
    """Open the data set in a folder, local or at an fsspec address, after checking that all its shards are there.

    `tars` is where the tars lie, when `clipscale-shards index` put the sidecars elsewhere. It must be said: an index does not get to
    choose what is read.

    Raises:
        DataError: the folder, its index or a shard is missing, a shard has another size than indexed, or nothing is in it.
        MissingPackage: the address needs an fsspec back-end that is not installed.
    """
    address = str(url)
    filesystem, root = _filesystem(address)
    files = _list(filesystem, root, f"data set {address}")
    if "index.parquet" not in files:
        number = sum(name.endswith(".tar") for name in files)
        found = f"{number} .tar files without an index" if number else "neither an index nor .tar files"
        raise DataError(
            f"data set {address}: no index.parquet; it holds {found}. Make data sets with `clipscale-shards build`, "
            f"or use tars as they are with `clipscale-shards index`"
        )
    table = _read_index(address, filesystem.cat_file(f"{root}/index.parquet"))
    _check_place(address, tars, table)
    index = DatasetIndex(address, table, tars=tars)
    _check_files(index, files if tars is None else files | _list(*_filesystem(tars), f"tars {tars}"))
    return index


def _list(filesystem: Any, root: str, what: str) -> dict[str, int]:
    """Names and sizes of a folder's files."""
    try:
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in filesystem.ls(root, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{what}: there is no such folder") from None
    except OSError as error:
        raise DataError(f"{what}: the folder cannot be listed: {error}") from error


def _check_place(url: str, tars: str | None, table: pyarrow.Table) -> None:
    """Tars that lie elsewhere must be asked for."""
    elsewhere = (table.schema.metadata or {}).get(b"tars", b"").decode()
    if elsewhere and tars is None:
        raise DataError(
            f"data set {url}: it holds sidecars only; its tars lay at {elsewhere} when they were indexed. Say where they lie now: "
            f"{{name: shards, url: {url}, tars: {elsewhere}}}"
        )


def _read_index(url: str, data: bytes) -> pyarrow.Table:
    try:
        table = read_parquet(data)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data set {url}: index.parquet cannot be read ({error}); build the data set again") from error
    if not table.schema.equals(INDEX, check_metadata=False):
        missing = sorted(set(INDEX.names) - set(table.column_names))
        raise DataError(f"data set {url}: index.parquet is of another format (missing columns: {missing}); build the data set again")
    return table


def _check_files(index: DatasetIndex, files: dict[str, int]) -> None:
    if not index.shards:
        raise DataError(f"data set {index.url}: index.parquet lists no shards; build the data set again")
    if not index.samples.sum():
        raise DataError(f"data set {index.url}: none of its {len(index.shards)} shards holds a usable sample")
    foreign = [shard for shard in index.shards if not SHARD_NAME.fullmatch(shard) or shard == "index"]
    if foreign:
        raise DataError(f"data set {index.url}: index.parquet names shard '{foreign[0]}', which is no plain file name; refused")
    missing = [name for shard in index.shards for name in (f"{shard}.tar", f"{shard}.parquet") if name not in files]
    if missing:
        raise DataError(f"data set {index.url}: {len(missing)} of the files that index.parquet lists are missing: {_first(missing)}")
    wrong = [
        f"{shard}.tar ({files[f'{shard}.tar']} bytes, indexed {size})"
        for shard, size in zip(index.shards, index.tar_bytes, strict=True)
        if files[f"{shard}.tar"] != size
    ]
    if wrong:
        raise DataError(
            f"data set {index.url}: {len(wrong)} shards have another size than indexed: {_first(wrong)}; copy or build them again"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def read_member(url: str | Path, key: str, suffixes: Sequence[str]) -> tuple[str, bytes]:
    """Suffix and bytes of the sample's image or recording, whichever has one of the suffixes (`("flac", "wav")`).

    Raises:
        DataError: the data set cannot be opened, or has no such sample or member.
        ShardError: the sample cannot be read.
    """
    index = open_dataset(url)
    shard, row = index.find(key)
    sample = index.read(shard, [row])[0]
    if isinstance(sample, ShardError):
        raise sample
    for suffix, data in ((index.suffix(shard, row, "image"), sample.image), (index.suffix(shard, row, "speech"), sample.speech)):
        if data is not None and suffix in suffixes:
            return suffix, data
    raise DataError(f"{url}: sample '{key}' has no member {' or '.join(suffixes)}")
