"""Opening a data set: its index is read, and all that it lists is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow

from clipscale.data.dataset import DatasetIndex
from clipscale.data.shard_cache import Cache
from clipscale.data.store import Reading, Store
from clipscale.data.tables import INDEX, SHARD_NAME, read_parquet
from clipscale.errors import DataError, ShardError


def open_dataset(url: str | Path, *, tars: str | None = None, reading: Reading | None = None, cache: Cache | None = None) -> DatasetIndex:
    """Open the data set in a folder, local or at an fsspec address, after checking that all its shards are there.

    `tars` is where the tars lie, when `clipscale-shards index` put the sidecars elsewhere. It must be said: an index does not get to
    choose what is read. Web servers cannot list a folder; what is missing there turns up when it is read.

    Raises:
        DataError: the folder, its index or a shard is missing, a shard has another size than indexed, or nothing is in it.
        MissingPackage: the address needs an fsspec back-end that is not installed.
    """
    address = str(url)
    store = Store(address, reading=reading)
    files = _list(store, f"data set {address}")
    table = _read_index(store, files)
    _check_place(address, tars, table)
    index = DatasetIndex(address, table, tars=tars, reading=reading, cache=cache)
    _check_names(index)
    _check_files(index, {".parquet": files, ".tar": files if tars is None else _list(Store(tars, reading=reading), f"tars {tars}")})
    return index


def _list(store: Store, what: str) -> dict[str, int] | None:
    try:
        return store.sizes()
    except DataError as error:
        raise DataError(f"{what}: {str(error).removeprefix(store.url).lstrip(': ')}") from None


def _read_index(store: Store, files: dict[str, int] | None) -> pyarrow.Table:
    if files is not None and "index.parquet" not in files:
        number = sum(name.endswith(".tar") for name in files)
        raise _no_index(store.url, f"it holds {f'{number} .tar files without an index' if number else 'neither an index nor .tar files'}")
    data = _index_bytes(store)
    try:
        table = read_parquet(data)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data set {store.url}: index.parquet cannot be read ({error}); build or index the data set again") from error
    if not table.schema.equals(INDEX, check_metadata=False):
        missing = sorted(set(INDEX.names) - set(table.column_names))
        raise DataError(f"data set {store.url}: index.parquet is of another format (missing columns: {missing}); build the data set again")
    return table


def _no_index(url: str, found: str) -> DataError:
    return DataError(
        f"data set {url}: no index.parquet; {found}. Make data sets with `clipscale-shards build`, "
        f"or use tars as they are with `clipscale-shards index`"
    )


def _index_bytes(store: Store) -> bytes:
    """The index; of a store it is asked for until it has the sum that index.sha256 tells: cut short, it would look damaged."""
    try:
        for _ in range(1 if store.is_local else store.reading.tries):
            data = store.read("index.parquet")
            if store.is_local or hashlib.sha256(data).hexdigest() in store.read("index.sha256").decode("ascii", "replace"):
                break
    except FileNotFoundError as error:
        if "index.sha256" not in str(error):
            raise _no_index(store.url, "there is no such file") from None
    except ShardError as error:
        raise DataError(f"data set {store.url}: {error}") from error
    return data


def _check_place(url: str, tars: str | None, table: pyarrow.Table) -> None:
    """Tars that lie elsewhere must be asked for."""
    elsewhere = (table.schema.metadata or {}).get(b"tars", b"").decode()
    if elsewhere and tars is None:
        raise DataError(
            f"data set {url}: it holds sidecars only; its tars lay at {elsewhere} when they were indexed. Say where they lie now: "
            f"{{name: shards, url: {url}, tars: {elsewhere}}}"
        )


def _check_names(index: DatasetIndex) -> None:
    if not index.shards:
        raise DataError(f"data set {index.url}: index.parquet lists no shards; build the data set again")
    if not index.samples.sum():
        raise DataError(f"data set {index.url}: none of its {len(index.shards)} shards holds a usable sample")
    foreign = [shard for shard in index.shards if not SHARD_NAME.fullmatch(shard) or shard == "index"]
    if foreign:
        raise DataError(f"data set {index.url}: index.parquet names shard '{foreign[0]}', which is no plain file name; refused")


def _check_files(index: DatasetIndex, listed: Mapping[str, dict[str, int] | None]) -> None:
    """`listed`: sizes of the files that lie where those of each suffix should, or None where nobody can tell."""
    missing = [
        f"{shard}{suffix}"
        for shard in index.shards
        for suffix in (".tar", ".parquet")
        if (files := listed[suffix]) is not None and f"{shard}{suffix}" not in files
    ]
    if missing:
        raise DataError(f"data set {index.url}: {len(missing)} of the files that index.parquet lists are missing: {_first(missing)}")
    tars = listed[".tar"] or {}
    wrong = [
        f"{shard}.tar ({tars[f'{shard}.tar']} bytes, indexed {size})"
        for shard, size in zip(index.shards, index.tar_bytes, strict=True)
        if tars.get(f"{shard}.tar", size) != size
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
