"""Gradient caching: the exact gradient of a global batch whose activations never exist all at once.

The micro-batches are embedded without keeping activations; the exact loss is taken once on all embeddings; each
micro-batch is then encoded again, under the same random state, and given its embeddings' gradients. Gradients are
synchronised once, with the last micro-batch. This is GradAccum of BASIC (Pham et al. 2021, arXiv:2111.10050, section 4.2)
and GradCache (Gao et al. 2021, arXiv:2101.06983). Wholly locked towers run once: their features are kept.

b rows of a pair kind on this rank, D width of the shared embedding space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from clipscale.engines import Trainable
from clipscale.inputs import Modality
from clipscale.model import FEATURES, KindOutput, PreparedKinds
from clipscale.phases import phase

Losses = TypeVar("Losses")
Prepare = Callable[[PreparedKinds], PreparedKinds]


def cached_backward(
    trainable: Trainable,
    kinds: PreparedKinds,
    contrast: Callable[[dict[str, KindOutput]], tuple[Tensor, Losses]],
    *,
    micro_batch: int,
    seed: Callable[[int], None],
    prepare: Prepare = lambda part: part,
) -> Losses:
    """Accumulate the gradient of `contrast` over all rows of `kinds`, `micro_batch` rows on the device at a time.

    Args:
        trainable: the model under its engine.
        kinds: this rank's rows of every pair kind that is due.
        contrast: the total loss, a global mean, and whatever else it has to tell, from every row's embeddings.
        micro_batch: rows of a pair kind encoded at a time.
        seed: puts the random generators into the state of the i-th micro-batch.
        prepare: brings rows to the device, as their towers are fed; called twice with each micro-batch, it must answer the same.
    """
    parts = split(kinds, micro_batch=micro_batch)
    outputs: dict[str, KindOutput] = {}
    places = _places(parts)
    with phase("encode"), torch.no_grad():
        for index, part in enumerate(parts):
            seed(index)
            for kind, embedded in trainable.encode(prepare(part)).items():
                outputs[kind] = _put(outputs.get(kind), embedded, places[index][kind], rows=_rows(kinds[kind]))
    outputs = {kind: _as_leaves(output) for kind, output in outputs.items()}
    with phase("contrast"):
        total, losses = contrast(outputs)
        total.backward()  # type: ignore[no-untyped-call]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        seed(index)
        with nullcontext() if last else trainable.unsynchronised():
            with phase("encode"):
                again = trainable.encode(_without_locked(trainable, part, outputs, places[index], prepare))
            with phase("backward"):
                products = [_inner_product(again[kind], outputs[kind], places[index][kind], with_temperature=last) for kind in again]
                trainable.backward(torch.stack(products).sum())
    return losses


def _put(outputs: KindOutput | None, embedded: KindOutput, place: slice, *, rows: int) -> KindOutput:
    """A micro-batch's embeddings in their place among all `rows` of its pair kind, whose memory is taken once."""
    if outputs is None:
        outputs = KindOutput(
            x=_room(embedded.x, rows),
            y=_room(embedded.y, rows),
            scale=embedded.scale.clone(),
            features_x=None if embedded.features_x is None else _room(embedded.features_x, rows),
            features_y=None if embedded.features_y is None else _room(embedded.features_y, rows),
            bias=None if embedded.bias is None else embedded.bias.clone(),
        )
    for whole, part in (
        (outputs.x, embedded.x),
        (outputs.y, embedded.y),
        (outputs.features_x, embedded.features_x),
        (outputs.features_y, embedded.features_y),
    ):
        if whole is not None and part is not None:
            whole[place] = part
    return outputs


def _room(part: Tensor, rows: int) -> Tensor:
    return part.new_empty(rows, part.shape[1])


def _as_leaves(output: KindOutput) -> KindOutput:
    """Embeddings and temperature ready to receive gradients."""
    return replace(
        output,
        x=output.x.requires_grad_(),
        y=output.y.requires_grad_(),
        scale=output.scale.requires_grad_(),
        bias=None if output.bias is None else output.bias.requires_grad_(),
    )


def _without_locked(
    trainable: Trainable, part: PreparedKinds, outputs: Mapping[str, KindOutput], places: Mapping[str, slice], prepare: Prepare
) -> PreparedKinds:
    """A micro-batch for the second time, prepared, with features instead of what wholly locked towers were fed."""
    kept: PreparedKinds = {}
    for kind in part:
        modalities = trainable.model.pair_kinds[kind].modalities
        features = zip(modalities, (outputs[kind].features_x, outputs[kind].features_y), strict=True)
        kept[kind] = {modality: {FEATURES: tensor[places[kind]]} for modality, tensor in features if tensor is not None}
    fed = prepare(
        {kind: {name: tensors for name, tensors in modalities.items() if name not in kept[kind]} for kind, modalities in part.items()}
    )
    return {kind: {**fed[kind], **kept[kind]} for kind in part}


def _inner_product(again: KindOutput, cached: KindOutput, place: slice, *, with_temperature: bool) -> Tensor:
    """A scalar whose gradient, at the embeddings just made, is the cached one."""
    product = (again.x * _gradient(cached.x)[place]).sum() + (again.y * _gradient(cached.y)[place]).sum()
    if with_temperature:
        product = product + (again.scale * _gradient(cached.scale)).sum()
        if again.bias is not None and cached.bias is not None:
            product = product + (again.bias * _gradient(cached.bias)).sum()
    return product


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def split(kinds: PreparedKinds, *, micro_batch: int) -> list[PreparedKinds]:
    """Micro-batches of at most `micro_batch` rows of each kind; the last one holds rows of every kind.

    The last must: gradients travel with it, and a tower without rows there would keep its gradient to itself.
    """
    sizes = {kind: _rows(modalities) for kind, modalities in kinds.items()}
    count = max(1, max(math.ceil(size / micro_batch) for size in sizes.values()))
    parts: list[PreparedKinds] = []
    for index in range(count):
        part = {}
        for kind, size in sizes.items():
            start, stop = size * index // count, size * (index + 1) // count
            if stop > start:
                part[kind] = {
                    modality: {name: tensor[start:stop] for name, tensor in tensors.items()} for modality, tensors in kinds[kind].items()
                }
        parts.append(part)
    return [part for part in parts if part]


def _places(parts: list[PreparedKinds]) -> list[dict[str, slice]]:
    """Where each micro-batch's rows stand among all rows of their pair kind."""
    taken: dict[str, int] = {}
    places: list[dict[str, slice]] = []
    for part in parts:
        starts = {kind: taken.get(kind, 0) for kind in part}
        taken |= {kind: start + _rows(part[kind]) for kind, start in starts.items()}
        places.append({kind: slice(start, taken[kind]) for kind, start in starts.items()})
    return places


def _rows(modalities: Mapping[Modality, Mapping[str, Tensor]]) -> int:
    return len(next(iter(next(iter(modalities.values())).values())))
