"""Load a run's newest checkpoint, embed a data set's images (or recordings), and find those that fit some words.

python examples/embed_and_search.py runs/own-images data/shards/photos_test "a dog on a beach"
python examples/embed_and_search.py runs/own-speech data/shards/speech_test "good morning" speech
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from clipscale import checkpoints
from clipscale.config import load_run
from clipscale.data.sources import Source
from clipscale.data.stream import evaluation_batches
from clipscale.inputs import Modality, TextInput
from clipscale.model import Encoders, prepare
from clipscale.run_model import build_model


def load(run: str | Path) -> Encoders:
    """The encoders of a run, as its newest whole checkpoint holds them; the run is a folder, or an address such as s3://bucket/runs/NAME."""
    with checkpoints.Opening() as opening:
        saved = opening.load(opening.find(run))
        model = build_model(load_run([saved.folder / "config.yaml"]))
    model.load_state_dict(saved.tensors["model"])
    return model.eval()


@torch.no_grad()
def search(model: Encoders, url: str, words: str, modality: Modality, *, results: int = 5) -> list[tuple[float, str, str]]:
    """Cosine, key and first caption of the samples that lie closest to the words."""
    inputs = model.inputs()
    captions, embeddings, names = inputs["text"], list[Tensor](), list[tuple[str, str]]()
    assert isinstance(captions, TextInput)
    source = Source.model_validate({"name": "shards", "url": url})
    for batch in evaluation_batches(source, modalities=[modality], inputs=inputs, batch_size=64):
        embeddings.append(model.encode(modality, prepare(modality, inputs[modality], batch.inputs[modality])))
        names += [(key, texts[0]) for key, texts in zip(batch.keys, batch.captions, strict=True)]
    cosines = torch.cat(embeddings) @ model.encode("text", captions.tokenize([words]))[0]
    best = cosines.topk(min(results, len(names)))
    return [(value, *names[place]) for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


if __name__ == "__main__":
    folder, url, words, *more = sys.argv[1:]
    for cosine, key, caption in search(load(folder), url, words, "speech" if "speech" in more else "image"):
        print(f"{cosine:.3f}  {key}  {caption}")
