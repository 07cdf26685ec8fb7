"""Plain webdataset tars without an index, streamed in turn: a restart repeats part of them, and their order depends on the ranks."""

from __future__ import annotations

from clipscale.data.sources import StreamedSource
from clipscale.data.unindexed import UnindexedTars


class Tars(StreamedSource):
    """A folder of tars; `clipscale-shards index` makes them a data set that is read exactly."""

    def open_stream(self) -> UnindexedTars:
        return UnindexedTars(self.url)
