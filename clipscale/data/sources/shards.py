"""Indexed webdataset shards, as `clipscale-shards build` and `clipscale-shards index` make them: samples are read by byte offset."""

from __future__ import annotations

from clipscale.data.dataset import DatasetIndex, open_dataset
from clipscale.data.sources import Source


class Shards(Source):
    """A folder of tars with parquet sidecars (clipscale/data/shards.py)."""

    tars: str | None = None
    """Folder of the tars, local or at an fsspec address, when `clipscale-shards index --sidecars` put the sidecars elsewhere."""

    def open(self) -> DatasetIndex:
        return open_dataset(self.url, tars=self.tars)
