"""Gradient caching: the exact gradient of a global batch whose activations never exist all at once.

The micro-batches are embedded without keeping activations; the exact loss is taken once on all embeddings; each
micro-batch is then encoded again, under the same random state, and given its embeddings' gradients. Gradients are
synchronised once, with the last micro-batch. This is GradAccum of BASIC (Pham et al. 2021, arXiv:2111.10050, section 4.2)
and GradCache (Gao et al. 2021, arXiv:2101.06983).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from clipscale.engines import Trainable
from clipscale.inputs import Modality
from clipscale.model import KindOutput, PreparedKinds
from clipscale.phases import phase

Losses = TypeVar("Losses")


def cached_backward(
    trainable: Trainable,
    kinds: PreparedKinds,
    contrast: Callable[[dict[str, KindOutput]], tuple[Tensor, Losses]],
    *,
    micro_batch: int,
    seed: Callable[[int], None],
) -> Losses:
    """Accumulate the gradient of `contrast` over all rows of `kinds`, `micro_batch` rows in memory at a time.

    Args:
        trainable: the model under its engine.
        kinds: this rank's prepared rows of every pair kind that is due.
        contrast: the total loss, a global mean, and whatever else it has to tell, from every row's embeddings.
        micro_batch: rows of a pair kind encoded at a time.
        seed: puts the random generators into the state of the i-th micro-batch.
    """
    parts = split(kinds, micro_batch=micro_batch)
    with phase("encode"), torch.no_grad():
        embedded = []
        for index, part in enumerate(parts):
            seed(index)
            embedded.append(trainable.encode(part))
    outputs = _as_leaves(embedded)
    with phase("contrast"):
        total, losses = contrast(outputs)
        total.backward()  # type: ignore[no-untyped-call]
    _encode_again(trainable, parts, outputs, seed)
    return losses


def _encode_again(trainable: Trainable, parts: list[PreparedKinds], outputs: Mapping[str, KindOutput], seed: Callable[[int], None]) -> None:
    taken = dict.fromkeys(outputs, 0)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        seed(index)
        with nullcontext() if last else trainable.unsynchronised():
            surrogate = torch.zeros((), device=next(iter(outputs.values())).x.device)
            with phase("encode"):
                encoded = trainable.encode(part)
            with phase("backward"):
                for kind, again in encoded.items():
                    rows = slice(taken[kind], taken[kind] + len(again.x))
                    taken[kind] = rows.stop
                    surrogate = surrogate + _inner_product(again, outputs[kind], rows, with_temperature=last)
                trainable.backward(surrogate)


def _inner_product(again: KindOutput, cached: KindOutput, rows: slice, *, with_temperature: bool) -> Tensor:
    """A scalar whose gradient, at the embeddings just made, is the cached one."""
    product = (again.x * _gradient(cached.x)[rows]).sum() + (again.y * _gradient(cached.y)[rows]).sum()
    if with_temperature:
        product = product + (again.scale * _gradient(cached.scale)).sum()
        if again.bias is not None and cached.bias is not None:
            product = product + (again.bias * _gradient(cached.bias)).sum()
    return product


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _as_leaves(embedded: list[dict[str, KindOutput]]) -> dict[str, KindOutput]:
    """All micro-batches' outputs joined by pair kind; embeddings and temperature ready to receive gradients."""
    joined = {}
    for kind in embedded[-1]:
        parts = [outputs[kind] for outputs in embedded if kind in outputs]
        last = parts[-1]
        joined[kind] = KindOutput(
            x=torch.cat([part.x for part in parts]).requires_grad_(),
            y=torch.cat([part.y for part in parts]).requires_grad_(),
            guide_x=_join([part.guide_x for part in parts]),
            guide_y=_join([part.guide_y for part in parts]),
            scale=last.scale.clone().requires_grad_(),
            bias=None if last.bias is None else last.bias.clone().requires_grad_(),
        )
    return joined


def _join(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


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


def _rows(modalities: Mapping[Modality, Mapping[str, Tensor]]) -> int:
    return len(next(iter(next(iter(modalities.values())).values())))
