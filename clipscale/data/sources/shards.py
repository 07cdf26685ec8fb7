"""Indexed webdataset shards, as `clipscale-shards build` makes them: samples are read by byte offset."""

from __future__ import annotations

from clipscale.data.dataset import DatasetIndex, open_dataset
from clipscale.data.sources import Source


class Shards(Source):
    """A folder of tars with parquet sidecars (clipscale/data/shards.py)."""

    def open(self) -> DatasetIndex:
        return open_dataset(self.url)
