"""Samples become a batch: captions chosen, media stacked, what could not be read told.

b rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clipscale.data.reader import Decoded, collate
from clipscale.data.sample import BadSample, Batch, caption_id
from clipscale.data.text import choose_caption
from clipscale.inputs import Input, Modality


def make_batch(
    samples: Sequence[Decoded | BadSample],
    seeds: Tensor,
    *,
    kind: str,
    inputs: Mapping[Modality, Input],
    reading: dict[str, dict[str, float]],
    finished: dict[str, list[int]] | None = None,
) -> Batch:
    """One rank's rows of a global batch; `seeds` int64 [b] choose among a sample's captions."""
    good = [sample if isinstance(sample, Decoded) else None for sample in samples]
    captions = ["" if sample is None else choose_caption(sample.captions, seed) for sample, seed in zip(good, seeds.tolist(), strict=True)]
    collated = collate(good, captions, inputs)
    return Batch(
        kind=kind,
        inputs=collated,
        captions=captions,
        caption_ids=torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        seeds=seeds,
        valid=torch.tensor([sample is not None for sample in good]),
        bad=[sample for sample in samples if isinstance(sample, BadSample)],
        filled=filled(collated),
        reading=reading,
        finished=finished or {},
    )


def filled(inputs: Mapping[Modality, Mapping[str, Tensor]]) -> dict[Modality, tuple[int, int]]:
    """Of speech and text: places that hold something, and all places, padding included."""
    counts: dict[Modality, tuple[int, int]] = {}
    if "speech" in inputs:
        waveform, length = inputs["speech"]["waveform"], inputs["speech"]["length"]
        counts["speech"] = int(length.sum()), waveform.numel()
    if "text" in inputs:
        mask = inputs["text"]["mask"]
        counts["text"] = int(mask.sum()), mask.numel()
    return counts
