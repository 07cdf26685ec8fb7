"""An indexed data set, opened: its shards, and its samples read by byte offset."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow

from clipscale.data.sample import Sample, parse_sample
from clipscale.data.shard_cache import Cache, ShardCache
from clipscale.data.store import Garbled, Reading, Store
from clipscale.data.tables import read_parquet
from clipscale.errors import DataError, ShardError

KEPT_PLACES = 256
"""Shards whose samples' places a process keeps in memory for each data set: 1 MB for a shard of 10,000."""
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

    def __init__(
        self, url: str, table: pyarrow.Table, *, tars: str | None = None, reading: Reading | None = None, cache: Cache | None = None
    ) -> None:
        """`tars` is where the tars lie, when they do not lie beside the sidecars; `cache` keeps those of a store on this machine."""
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
        self._sha256: list[bytes] = table.column("sha256").to_pylist()
        self._sidecar_sha256: list[bytes] = table.column("sidecar_sha256").to_pylist()
        hashes = b"".join([*self._sha256, *self._sidecar_sha256])
        self.fingerprint = hashlib.sha256("\n".join(self.shards).encode() + hashes).hexdigest()
        """Hash of all its bytes, through the hashes in the index."""
        self.counters: dict[str, float] = {}
        """`bytes` and `reads` that came, `retries`; with a cache `cache_hits` and `cache_misses`, by shards read from."""
        self._sidecar_store = Store(url, reading=reading, counters=self.counters)
        self._store = Store(self.tars, reading=reading, counters=self.counters)
        self._cache = None if cache is None else ShardCache(cache)
        if self._cache is not None:
            self._cache.check(int(self.tar_bytes.max(initial=0)))
            self.counters |= {"cache_hits": 0, "cache_misses": 0}
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()
        self._places: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def sidecar(self, shard: int) -> Sidecar:
        """The sidecar of the shard at this place in the index.

        Raises:
            ShardError: it is gone, or not the one that was indexed.
        """
        return _recent(self._sidecars, shard, lambda shard: Sidecar(self._read_sidecar(shard)), size=1)

    def _where(self, shard: int) -> dict[str, np.ndarray]:
        """The columns that reading needs, keys as UTF-8 bytes."""

        def read(shard: int) -> dict[str, np.ndarray]:
            columns = self._read_sidecar(shard, [*_PLACES, "status"])
            return {name: _encoded(columns[name]) if name == "key" else columns[name] for name in _PLACES}

        return _recent(self._places, shard, read, size=KEPT_PLACES)

    def _read_sidecar(
        self, shard: int, names: list[str] | None = None, *, first_try: Callable[[], bytes] | None = None
    ) -> dict[str, np.ndarray]:
        name = f"{self.shards[shard]}.parquet"
        table = read_parquet(self._sidecar_bytes(shard, name, first_try), columns=names)
        columns = {column: table.column(column).to_numpy(zero_copy_only=False) for column in table.column_names}
        good = columns["status"] == "ok"
        columns = columns if good.all() else {column: values[good] for column, values in columns.items()}
        if len(columns["key"]) != self.samples[shard] or (columns["offset"] + columns["bytes"] > self.tar_bytes[shard]).any():
            raise ShardError(f"{self.url}/{name} does not fit index.parquet; build or index the data set again")
        return columns

    def _sidecar_bytes(self, shard: int, name: str, first_try: Callable[[], bytes] | None) -> bytes:
        for attempt in range(self._tries(self._sidecar_store)):
            self.counters["retries"] += attempt > 0
            try:
                data = first_try() if first_try and not attempt else self._sidecar_store.read(name)
            except FileNotFoundError:
                raise ShardError(f"{self.url}/{name} is gone since the data set was opened") from None
            if hashlib.sha256(data).digest() == self._sidecar_sha256[shard]:
                return data
        raise ShardError(f"{self.url}/{name} is not the sidecar that index.parquet describes; build or index the data set again")

    def _tries(self, store: Store) -> int:
        """How often bytes that are not those that were written are asked for: a disk gives the same ones a second time, or does not."""
        return min(2, store.reading.tries) if store.is_local else store.reading.tries

    def read(self, shard: int, rows: Sequence[int]) -> list[Sample | ShardError]:
        """The samples at these places in the shard's sidecar; one that cannot be read, after all tries, is a ShardError in its place.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        columns = self._where(shard)
        found = self._sample_bytes(shard, columns, rows)
        where = f"{self.tars}/{self.shards[shard]}.tar"
        return [data if isinstance(data, ShardError) else _unpack(where, columns, row, data) for row, data in zip(rows, found, strict=True)]

    def read_bytes(self, shard: int, row: int) -> bytes:
        """A sample as it lies in its tar, headers and padding included; checked against its checksum, and read again when it fails it.

        Raises:
            ShardError: it cannot be read.
        """
        data = self._sample_bytes(shard, self._where(shard), [row])[0]
        if isinstance(data, ShardError):
            raise data
        return data

    def _sample_bytes(self, shard: int, columns: dict[str, np.ndarray], rows: Sequence[int]) -> list[bytes | ShardError]:
        """Samples as they lie in the tar, those that were garbled on the way asked for again."""
        found = self._checked(shard, columns, rows)
        for _ in range(1, self._tries(self._store)):
            garbled = [place for place, data in enumerate(found) if isinstance(data, Garbled)]
            if not garbled:
                break
            self.counters["retries"] += len(garbled)
            if self._cache is not None:
                self._cache.discard(self._sha256[shard])
            for place, data in zip(garbled, self._checked(shard, columns, [rows[place] for place in garbled]), strict=True):
                found[place] = data
        return found

    def _checked(self, shard: int, columns: dict[str, np.ndarray], rows: Sequence[int]) -> list[bytes | ShardError]:
        spans = [(int(columns["offset"][row]), int(columns["bytes"][row])) for row in rows]
        where = f"{self.tars}/{self.shards[shard]}.tar"
        try:
            found = self._cached(shard, spans) if self._cache is not None else self._store.ranges(f"{self.shards[shard]}.tar", spans)
        except ShardError as error:
            return [type(error)(f"{where}: {error}")] * len(rows)
        return [data if isinstance(data, ShardError) else _check(where, columns, row, data) for row, data in zip(rows, found, strict=True)]

    def _cached(self, shard: int, spans: Sequence[tuple[int, int]]) -> list[bytes | ShardError]:
        assert self._cache is not None
        size = int(self.tar_bytes[shard])

        def fetch(write: Callable[[bytes], object]) -> None:
            self._store.fetch(f"{self.shards[shard]}.tar", size, write)

        with self._cache.opened(self._sha256[shard], size, fetch) as (descriptor, hit):
            self.counters["cache_hits" if hit else "cache_misses"] += 1
            return [os.pread(descriptor, size, offset) for offset, size in spans]

    def key(self, shard: int, row: int) -> str:
        """A sample's key.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        return bytes(self._where(shard)["key"][row]).decode()

    def lengths(self, shards: Sequence[int], modality: str) -> Iterator[np.ndarray]:
        """Seconds of every sample's speech, or bytes of its first caption, float32, an array a shard; sidecars come several at a time.

        Raises:
            ShardError: a shard's sidecar cannot be read.
        """
        told = ["frames", "sample_rate"] if modality == "speech" else ["text_bytes"]
        sidecars = self._sidecar_store.read_each([f"{self.shards[shard]}.parquet" for shard in shards])
        for shard in shards:
            columns = self._read_sidecar(shard, ["key", "offset", "bytes", "status", *told], first_try=lambda: next(sidecars))
            length = columns["text_bytes"] if modality != "speech" else columns["frames"] / np.maximum(columns["sample_rate"], 1)
            yield length.astype(np.float32)

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


def _check(path: str, columns: dict[str, np.ndarray], row: int, data: bytes) -> bytes | Garbled:
    key = columns["key"][row].decode()
    if len(data) != columns["bytes"][row]:
        return Garbled(f"{path}: the file ends inside sample '{key}'")
    if zlib.crc32(data) != columns["crc32"][row]:
        return Garbled(f"{path}: sample '{key}' is not the one that was written (its checksum differs)")
    return data


def _unpack(path: str, columns: dict[str, np.ndarray], row: int, data: bytes) -> Sample | ShardError:
    key = columns["key"][row].decode()
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


def _recent(cache: OrderedDict[int, Value], key: int, make: Callable[[int], Value], *, size: int) -> Value:
    """The value from a cache of the `size` most recently used."""
    if key not in cache:
        cache[key] = make(key)
        if len(cache) > size:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
