"""How long samples are, told by their sidecars without reading them: seconds of speech, or bytes of caption."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from clipscale.data.sources import OpenSource
from clipscale.errors import ShardError
from clipscale.inputs import Input, Modality, SpeechInput

KEPT_SAMPLES = 1 << 22
"""Samples whose lengths a process keeps for each source: 16 MB."""


class SampleLengths:
    """Lengths of the samples of some sources: of their speech where the pair kind has speech, else of their first caption."""

    def __init__(self, sources: Sequence[OpenSource], inputs: Mapping[Modality, Input]) -> None:
        self._sources = sources
        speech = inputs.get("speech")
        self._modality: Modality = "text" if speech is None else "speech"
        self._longest = speech.max_seconds if isinstance(speech, SpeechInput) else np.inf
        self._kept: list[OrderedDict[int, np.ndarray]] = [OrderedDict() for _ in sources]

    def __call__(self, source: int, shard: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Lengths at these shards and places of a source; recordings that are cut are as long as they are cut to.

        Raises:
            ShardError: a sidecar cannot be read: without it the ranks could not agree on the batches.
        """
        found = np.empty(len(shard), dtype=np.float32)
        by_shard = np.argsort(shard, kind="stable")
        shards, begins = np.unique(shard[by_shard], return_index=True)
        rows = dict(zip(shards.tolist(), np.split(by_shard, begins[1:]), strict=True))
        for one, lengths in self._of(source, list(rows)):
            found[rows[one]] = lengths[place[rows[one]]]
        return np.minimum(found, np.float32(self._longest))

    def _of(self, source: int, shards: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Shards in some order, each with the lengths of its samples."""
        kept = self._kept[source]
        for shard in [shard for shard in shards if shard in kept]:
            kept.move_to_end(shard)
            yield shard, kept[shard]
        missing = [shard for shard in shards if shard not in kept]
        size = sum(map(len, kept.values()))
        try:
            for shard, lengths in zip(missing, self._sources[source].lengths(missing, self._modality), strict=True):
                kept[shard] = lengths.astype(np.float32)
                size += len(lengths)
                while size > KEPT_SAMPLES and len(kept) > 1:
                    size -= len(kept.popitem(last=False)[1])
                yield shard, kept[shard]
        except ShardError as error:
            raise ShardError(f"length buckets need every sidecar, or ranks would not agree on the batches: {error}") from error
