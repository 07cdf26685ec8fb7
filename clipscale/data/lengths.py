"""How long samples are, told by their sidecars without reading them: seconds of speech, or bytes of caption."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

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
        for one in np.unique(shard).tolist():
            mine = shard == one
            found[mine] = self._of(source, one)[place[mine]]
        return np.minimum(found, np.float32(self._longest))

    def _of(self, source: int, shard: int) -> np.ndarray:
        kept = self._kept[source]
        if shard not in kept:
            try:
                kept[shard] = self._sources[source].lengths(shard, self._modality).astype(np.float32)
            except ShardError as error:
                raise ShardError(f"length buckets need every sidecar, or ranks would not agree on the batches: {error}") from error
            while _size(kept.values()) > KEPT_SAMPLES and len(kept) > 1:
                kept.popitem(last=False)
        kept.move_to_end(shard)
        return kept[shard]


def _size(arrays: Iterable[np.ndarray]) -> int:
    return sum(map(len, arrays))
