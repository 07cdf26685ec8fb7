"""Embedding: samples, captions and prompts to unit vectors, shared over ranks, whole and in order on every rank.

N samples, T texts, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipscale.data.stream import evaluation_batches
from clipscale.errors import DataError, RunError, ShardError
from clipscale.model import prepare
from clipscale.parallel.failures import raised_together

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipscale.data.sources import Source
    from clipscale.inputs import Modality
    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh


@dataclass(frozen=True)
class Rows:
    """The N samples of a data set, in its order."""

    source: str
    """The data set's address."""
    fingerprint: str
    """Hash of its content."""
    keys: list[str]
    captions: list[list[str]]
    records: list[dict[str, Any]]
    embeddings: Tensor
    """fp32 [N, D], normalised; [N, 0] when only the texts were asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def field(self, name: str) -> list[str]:
        """The record field `name` of every sample, as text.

        Raises:
            DataError: a record lacks it, or it is not a single value.
        """
        return [str(value) for value in self.values(name, (str, int))]

    def values(self, name: str, kind: type | tuple[type, ...]) -> list[Any]:
        """The record field `name` of every sample.

        Raises:
            DataError: a record lacks it, or it is of another type.
        """
        for key, record in zip(self.keys, self.records, strict=True):
            if not isinstance(record.get(name), kind):
                found = f"holds {type(record[name]).__name__}" if name in record else f"is missing; it has {', '.join(sorted(record))}"
                raise DataError(f"{self.source}: sample '{key}': record field '{name}' {found}")
        return [record[name] for record in self.records]


def embed_rows(model: Encoders, mesh: Mesh, source: Source, modality: Modality, *, batch_size: int) -> Rows:
    """Embed every sample of a source; each rank its share, the result on all. With `text` only records and captions are read.

    Raises:
        ShardError: a sample cannot be read, on whichever rank; raised on all.
        RunError: an embedding is not finite.
    """
    opened = source.open()
    modalities = () if modality == "text" else (modality,)
    own: list[tuple[int, str, list[str], dict[str, Any]]] = []
    parts: list[tuple[Tensor, Tensor]] = []
    with raised_together(mesh), _evaluating(model):
        for batch in evaluation_batches(
            source, modalities=modalities, inputs=model.inputs(), batch_size=batch_size, rank=mesh.rank, world=mesh.world
        ):
            own += zip(batch.rows.tolist(), batch.keys, batch.captions, batch.records, strict=True)
            parts += [(batch.rows, _encode(model, mesh, name, batch.inputs[name])) for name in modalities]
    gathered = sorted((row for share in mesh.gather_objects(own) for row in share), key=itemgetter(0))
    num_rows = int(sum(opened.samples))
    if [row[0] for row in gathered] != list(range(num_rows)):
        raise ShardError(f"{opened.url}: {num_rows} samples are indexed, {len(gathered)} arrived; each must come exactly once")
    keys, captions, records = ([row[column] for row in gathered] for column in (1, 2, 3))
    embeddings = _share(mesh, parts, num_rows, model.embed_dim if modalities else 0, what=f"{opened.url}: {modality}", names=keys)
    return Rows(opened.url, opened.fingerprint, keys, captions, records, embeddings)


def embed_texts(model: Encoders, mesh: Mesh, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """Embed texts [T] to [T, D]. Each distinct text once, so that equal texts are equal to the last bit."""
    distinct = list(dict.fromkeys(texts))
    tokenize = model.inputs()["text"].tokenize  # type: ignore[union-attr]
    parts = []
    with raised_together(mesh), _evaluating(model):
        for start in range(mesh.rank * batch_size, len(distinct), mesh.world * batch_size):
            batch = distinct[start : start + batch_size]
            parts.append((torch.arange(start, start + len(batch)), _encode(model, mesh, "text", tokenize(batch))))
    embeddings = _share(mesh, parts, len(distinct), model.embed_dim, what="text", names=distinct)
    place = {text: row for row, text in enumerate(distinct)}
    return embeddings[torch.tensor([place[text] for text in texts], device=embeddings.device)]


def embed_prompts(model: Encoders, mesh: Mesh, prompts: Sequence[Sequence[str]], *, batch_size: int) -> Tensor:
    """One vector a class, [C, D]: the normalised mean of its prompts' normalised embeddings (Radford et al. 2021, §3.1.4)."""
    texts = embed_texts(model, mesh, [prompt for own in prompts for prompt in own], batch_size=batch_size)
    return normalize(torch.stack([own.mean(0) for own in torch.split(texts, [len(own) for own in prompts])]), dim=1)


def _encode(model: Encoders, mesh: Mesh, modality: Modality, inputs: dict[str, Tensor]) -> Tensor:
    on_device = {name: tensor.to(mesh.device) for name, tensor in inputs.items()}
    return model.encode(modality, prepare(modality, model.inputs()[modality], on_device))


def _share(mesh: Mesh, parts: list[tuple[Tensor, Tensor]], size: int, width: int, *, what: str, names: Sequence[str]) -> Tensor:
    """Every rank's rows on all ranks: [size, width]. Others' rows are zeros, and x + 0 is x to the last bit."""
    own = torch.zeros(size, width, device=mesh.device)
    for rows, embeddings in parts:
        own[rows.to(mesh.device)] = embeddings
    whole = mesh.all_reduce_sum(own)
    bad = (~whole.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise RunError(f"{what}: {len(bad)} of {size} embeddings are not finite, first '{names[bad[0]]}'; the checkpoint is damaged")
    return whole


@contextmanager
def _evaluating(model: Encoders) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back. (Inference mode would poison the model's feature cache.)"""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
