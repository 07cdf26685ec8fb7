"""Indexed webdataset shards, as `clipscale-shards build` and `clipscale-shards index` make them: samples are read by byte offset."""

from __future__ import annotations

from clipscale.data.dataset import DatasetIndex
from clipscale.data.opening import open_dataset
from clipscale.data.shard_cache import Cache
from clipscale.data.sources import Source
from clipscale.data.store import Reading


class Shards(Source):
    """A folder of tars with parquet sidecars (clipscale/data/shards.py)."""

    tars: str | None = None
    """Folder of the tars, local or at an fsspec address, when `clipscale-shards index --sidecars` put the sidecars elsewhere."""

    reading: Reading = Reading()
    """How the store is asked: timeouts, tries, and how much at once."""
    cache: Cache | None = None
    """Keep tars on a disk of this machine, for stores and network disks that are slower than that."""

    def open(self) -> DatasetIndex:
        return open_dataset(self.url, tars=self.tars, reading=self.reading, cache=self.cache)
