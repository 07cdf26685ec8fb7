"""Reading samples: stored bytes become what batches are made of.

b samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipscale.data.images import decode_image
from clipscale.data.sample import BadSample, Sample
from clipscale.data.sources import OpenSource
from clipscale.data.speech import collate_speech, decode_speech
from clipscale.data.text import clean_caption
from clipscale.errors import ShardError
from clipscale.inputs import ImageInput, Input, Modality, SpeechInput


@dataclass(frozen=True, slots=True)
class Decoded:
    """One sample, decoded as far as batches need it."""

    key: str
    image: Tensor | None
    speech: np.ndarray | None
    captions: list[str]
    record: dict[str, Any]


class Reader:
    """Reads and decodes samples of one source for the towers that will see them."""

    def __init__(self, source: OpenSource, inputs: Mapping[Modality, Input], *, cache: bool) -> None:
        self._source, self._inputs = source, inputs
        self._kept: dict[tuple[int, int], Decoded] | None = {} if cache else None

    def read(self, places: Sequence[tuple[int, int]]) -> list[Decoded | BadSample]:
        """Samples at these (shard, place in it); a BadSample where one cannot be read or decoded."""
        found: dict[tuple[int, int], Decoded | BadSample] = {}
        if self._kept is not None:
            found.update((place, self._kept[place]) for place in places if place in self._kept)
        wanted = sorted({place for place in places if place not in found})
        for shard, group in itertools.groupby(wanted, key=lambda place: place[0]):
            rows = [row for _, row in group]
            for row, sample in zip(rows, self._read_shard(shard, rows), strict=True):
                found[shard, row] = self._decode(shard, row, sample)
        return [found[place] for place in places]

    def _read_shard(self, shard: int, rows: list[int]) -> Sequence[Sample | ShardError]:
        try:
            return self._source.read(shard, rows)
        except ShardError as error:
            return [error] * len(rows)

    def _decode(self, shard: int, row: int, sample: Sample | ShardError) -> Decoded | BadSample:
        if isinstance(sample, ShardError):
            return BadSample(f"shard {shard}, sample {row}", self._source.url, str(sample))
        try:
            decoded = decode(sample, self._inputs)
        except ShardError as error:
            return BadSample(sample.key, self._source.url, str(error))
        if self._kept is not None:
            self._kept[shard, row] = decoded
        return decoded


def decode(sample: Sample, inputs: Mapping[Modality, Input]) -> Decoded:
    """The parts of a sample that these inputs need, decoded.

    Raises:
        ShardError: a needed part is missing or damaged.
    """
    image = speech = None
    for modality, spec in inputs.items():
        data = {"image": sample.image, "speech": sample.speech, "text": b""}[modality]
        if data is None:
            raise ShardError(f"the sample has no {modality}")
        if isinstance(spec, ImageInput):
            image = decode_image(data, spec)
        elif isinstance(spec, SpeechInput):
            speech = decode_speech(data, spec)
    captions = [cleaned for caption in sample.captions if (cleaned := clean_caption(caption))]
    if not captions:
        raise ShardError("every caption is empty")
    return Decoded(sample.key, image, speech, captions, sample.record)


def collate(samples: Sequence[Decoded | None], captions: list[str], inputs: Mapping[Modality, Input]) -> dict[Modality, dict[str, Tensor]]:
    """Inputs of all modalities; a missing sample is black, silent and has the empty caption."""
    collated: dict[Modality, dict[str, Tensor]] = {}
    for modality, spec in inputs.items():
        if isinstance(spec, ImageInput):
            black = torch.zeros(3, spec.size, spec.size, dtype=torch.uint8)
            images = [black if sample is None or sample.image is None else sample.image for sample in samples]
            collated[modality] = {"pixels": torch.stack(images) if images else black[None][:0]}
        elif isinstance(spec, SpeechInput):
            silence = np.zeros(spec.n_fft, dtype=np.int16)
            collated[modality] = collate_speech(
                [silence if sample is None or sample.speech is None else sample.speech for sample in samples], spec
            )
        else:
            collated[modality] = spec.tokenize(captions)
    return collated
