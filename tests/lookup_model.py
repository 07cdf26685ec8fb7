"""A model that looks embeddings up in tables, and samples that say which row: evaluations whose truth is known by hand.

A picture's grey level, and a recording's loudness, is the number of a row in its modality's table.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn

from clipscale.data.shards import ShardWriter, open_dataset, write_index
from clipscale.inputs import ImageInput, Input, SpeechInput, TextInput
from clipscale.model import Encoders
from clipscale.towers._module import TowerModule

IMAGE = ImageInput(size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear", fit="squash")
SPEECH = SpeechInput(max_seconds=1.0, features="waveform")


class LookUp(TowerModule):
    """A table of features [rows, D], and how to read a row's number from what the tower is fed."""

    def __init__(self, table: Tensor, spec: Input, row: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.embed_dim, self.input, self._row = table.shape[1], spec, row
        self.table = nn.Parameter(table.float())

    def blocks(self) -> list[nn.Module]:
        return [self]

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return []

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.table[self._row(inputs)]


def make_model(
    *,
    images: Sequence[Sequence[float]] | Tensor = ((1.0, 0.0),),
    speech: Sequence[Sequence[float]] | Tensor = ((1.0, 0.0),),
    texts: dict[str, Sequence[float]] | Tensor,
    projection: Tensor | None = None,
) -> Encoders:
    """A model with these tables; texts by their words, or a table in which a text's hash is its row. No projection: identity."""
    table, rows = (texts, None) if isinstance(texts, Tensor) else (torch.tensor(list(texts.values())), list(texts))

    def tokenize(captions: list[str]) -> dict[str, Tensor]:
        numbers = [zlib.crc32(caption.encode()) % len(table) if rows is None else rows.index(caption) for caption in captions]
        return {"tokens": torch.tensor(numbers)[:, None], "mask": torch.ones(len(numbers), 1, dtype=torch.int64)}

    modules = {
        "image": LookUp(torch.as_tensor(images), IMAGE, lambda inputs: (inputs["pixels"][:, 0, 0, 0] * 255).round().long()),
        "speech": LookUp(torch.as_tensor(speech), SPEECH, lambda inputs: (inputs["waveform"][:, 0] * 256).round().long()),
        "text": LookUp(table, TextInput(tokenize, context_length=1), lambda inputs: inputs["tokens"][:, 0]),
    }
    model = Encoders(modules, embed_dim=table.shape[1], pair_kinds={}, seed=0)
    for linear in model.projections.values():
        linear.weight.data = torch.eye(table.shape[1]) if projection is None else projection.clone()
    return model


@dataclass(frozen=True)
class Sample:
    """What `write_shards` stores of one sample; `image` and `speech` are table rows."""

    captions: list[str]
    image: int | None = None
    speech: int | None = None
    record: dict[str, Any] = field(default_factory=dict)


def write_shards(folder: Path, samples: Sequence[Sample], *, per_shard: int = 10) -> str:
    """Store the samples as s000, s001, ...; returns the data set's address."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        with ShardWriter(folder, f"{shard:06d}") as writer:
            for number, sample in enumerate(samples[start : start + per_shard], start):
                image = None if sample.image is None else _picture(sample.image)
                speech = None if sample.speech is None else _recording(sample.speech)
                writer.write(f"s{number:03d}", captions=sample.captions, image=image, speech=speech, record=sample.record)
        infos.append(writer.info)
    write_index(folder, infos)
    return str(folder)


def damage(url: str, key: str) -> None:
    """Change one byte of a stored sample."""
    index = open_dataset(url)
    shard, row = index.find(key)
    tar = Path(url) / f"{index.shards[shard]}.tar"
    data = bytearray(tar.read_bytes())
    data[int(index.sidecar(shard).columns["offset"][row]) + 540] ^= 1
    tar.write_bytes(data)


def _picture(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), row, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def _recording(row: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(160, row / 256, dtype=np.float32), 16_000, format="FLAC", subtype="PCM_16")
    return file.getvalue()


# --- one random case for every evaluator --------------------------------------------------------------------------

NUM_SAMPLES = 23
_SLOTS = {"on_lamp": ("on", "lamp"), "off_lamp": ("off", "lamp"), "on_heat": ("on", "heat"), "off_heat": ("off", "heat")}


def random_samples() -> list[Sample]:
    """Samples with an image, a recording, one to three captions, and every record field that an evaluator asks for."""
    samples = []
    for number in range(NUM_SAMPLES):
        intent, (action, object_) = list(_SLOTS.items())[number % 4]
        record = {
            "label": number % 7,
            "intent": intent,
            "intent_name": f"turn {action} the {object_}",
            "slots": {"action": action, "object": object_},
            "speaker": f"voice{number % 5}",
        }
        captions = [f"sample {number}", f"number {number % 11}", "the same for all"][: 1 + number % 3]
        samples.append(Sample(captions, image=number, speech=number, record=record))
    return samples


def random_model() -> Encoders:
    """Random tables and projection: nothing is found but by chance, and many scores lie close together."""
    generator = torch.Generator().manual_seed(0)
    images, speech, texts = (torch.randn(rows, 12, generator=generator) for rows in (NUM_SAMPLES, NUM_SAMPLES, 509))
    return make_model(images=images, speech=speech, texts=texts, projection=torch.randn(12, 12, generator=generator))


def evaluator_settings(url: str) -> dict[str, dict[str, Any]]:
    """Settings of every evaluator, in each of its ways, on `random_samples` at `url`."""
    source = {"name": "shards", "url": url}
    speech, image, text = ({"modality": modality, "source": source} for modality in ("speech", "image", "text"))
    return {
        "digits": {"name": "zero_shot_classification", "source": source, "templates": ["a {}", "{}"]},
        "spoken digits": {"name": "zero_shot_classification", "source": source, "modality": "speech"},
        "captions": {"name": "retrieval", "queries": image, "gallery": text, "match": "pair"},
        "transcripts": {"name": "retrieval", "queries": speech, "gallery": text, "match": "caption"},
        "never trained": {"name": "retrieval", "queries": speech, "gallery": image, "match": "label"},
        "intents": {"name": "speech_intent", "source": source},
        "intents by words": {"name": "speech_intent", "source": source, "slot_templates": ["turn {}", "{}"], "cluster": None},
        "space": {"name": "representation", "source": source},
        "neighbours": {"name": "representation", "source": source, "modality": "speech", "field": "label", "neighbours": 3},
    }
