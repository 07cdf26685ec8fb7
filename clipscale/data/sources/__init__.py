"""Sources: where samples come from, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Protocol

import numpy as np
from pydantic import Field

from clipscale.data.sample import BadSample, Sample
from clipscale.errors import DataError, ShardError
from clipscale.inputs import Modality
from clipscale.settings import Part


class OpenSource(Protocol):
    """A source, opened: how many samples each of its shards has, and their bytes. Used from forked workers too."""

    url: str
    shards: list[str]
    """Names of the shards."""
    samples: np.ndarray
    """Usable samples of each shard, int64."""
    totals: dict[str, float]
    """Over all shards: `samples`, and how many of them have an image (`images`) and speech (`recordings`)."""
    fingerprint: str
    """Changes when any byte of the data does."""
    counters: dict[str, float]
    """What reading has taken in this process so far (bytes, retries, cache hits, ...), by names of the source's own; they only grow."""

    def read(self, shard: int, rows: Sequence[int]) -> list[Sample | ShardError]:
        """The samples at these places of a shard; the error in place of one that cannot be read.

        Raises:
            ShardError: nothing of the shard can be read.
        """
        ...

    def key(self, shard: int, row: int) -> str:
        """A sample's key, told without reading it.

        Raises:
            ShardError: the shard's sidecar cannot be read.
        """
        ...

    def lengths(self, shards: Sequence[int], modality: Modality) -> Iterator[np.ndarray]:
        """How long each sample of these shards is, an array a shard, without reading it: seconds of speech, or bytes of the first caption.

        Raises:
            ShardError: a shard's sidecar cannot be read.
        """
        ...


class Source(Part, ABC):
    """A data set and its share of the training rows."""

    folder: ClassVar[str] = "clipscale.data.sources"

    url: str
    """Folder of the data set, local or at an fsspec address such as s3://bucket/folder."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the rows, relative to the other sources of the pair kind; more than its share of samples means more epochs."""
    later_weights: dict[Annotated[int, Field(strict=False, ge=0)], Annotated[float, Field(ge=0)]] = {}
    """Weights that take its place, by how many global batches of the pair kind have gone before: `{10000: 0.5, 20000: 0.0}`."""
    cache_decoded: bool = False
    """Keep decoded samples in memory, in each process that reads them; for small data sets that are gone through many times."""

    @abstractmethod
    def open(self) -> OpenSource:
        """Check that all of the data set is there, and open it.

        Raises:
            DataError: it is missing, incomplete or empty.
        """


class ShardStream(Protocol):
    """A source without an index, opened: its shards, each of which can only be read from its start. Used from forked workers too."""

    url: str
    shards: list[str]
    """Names of the shards."""
    totals: dict[str, float]
    """Empty: nothing is known before it is read."""
    fingerprint: str
    """Changes when a shard comes, goes or changes its size."""
    counters: dict[str, float]
    """As in `OpenSource`."""

    def read_shard(self, shard: int) -> Iterator[Sample | BadSample]:
        """The samples of a shard as they are stored, and what is wrong with those that cannot be read."""
        ...


class StreamedSource(Source, ABC):
    """A source without an index: for training alone, and in an order that depends on the ranks."""

    shuffle_samples: int = Field(default=500, gt=0)
    """Samples that a reader keeps, still encoded, to hand out in random order."""

    @abstractmethod
    def open_stream(self) -> ShardStream:
        """
        Raises:
            DataError: it is missing or empty.
        """

    def open(self) -> OpenSource:
        raise DataError(
            f"{self.url}: tars without an index can only be streamed for training, not looked up; index them with `clipscale-shards index`"
        )


__all__ = ["OpenSource", "ShardStream", "Source", "StreamedSource"]
