"""Footprint: what an engine holds on a rank and sends between ranks in one step, told from names and shapes before anything runs.

Bytes of collectives are exact, tests count them; they are those of one step in which every pair kind is due. Memory is that of the engine's
own tensors: what backends and libraries keep for themselves is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from clipscale.engines._sharded import temperatures
from clipscale.model import Encoders
from clipscale.optim import Optimizer

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class StepShape:
    """What of a step an engine must know."""

    world: int
    """Ranks."""
    parts: int
    """Micro-batches; 1: all rows in one graph."""
    precision: str
    optimizer: Optimizer
    steps_differ: bool
    """Some steps leave out a pair kind and its towers."""


@dataclass(frozen=True)
class Collective:
    """One kind of exchange, all of its calls in a step together."""

    what: str
    """What travels."""
    kind: CollectiveKind
    bytes: int
    """Handed over by every rank: the whole that is reduced, gathered to, or scattered from."""
    ranks: int
    """Ranks that take part in each call."""
    stride: int = 1
    """Distance between them: 1 for neighbours."""
    hidden: bool = True
    """Whether it can go on while towers compute."""

    @property
    def received(self) -> int:
        """Bytes that a rank receives: with rings, the least there can be."""
        return self.bytes * (self.ranks - 1) // self.ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Footprint:
    """What an engine holds and sends."""

    weights: int
    """Bytes of weights and buffers on the device."""
    gradients: int
    """Bytes of gradients when a backward pass is over."""
    state_share: float
    """Share of the optimizer's state, and of the weights' average, that lies on the device."""
    gradients_exist: bool
    """Whether gradients have their memory before the backward pass begins."""
    while_towers_run: Mapping[str, int] = field(default_factory=dict)
    """Further bytes on the device during forward and backward passes, by what they are."""
    always: Mapping[str, int] = field(default_factory=dict)
    """Further bytes on the device, by what they are."""
    rounding: Literal["autocast", "weights"] = "autocast"
    """How the run's precision comes about: by autocast, or because the engine rounds the weights."""
    collectives: Sequence[Collective] = ()
    """Those of the engine itself; the loss's are told by contrast/cost.py."""


def replica(model: nn.Module, *, parts: int) -> Footprint:
    """A whole model on one rank, which sends nothing.

    Args:
        parts: micro-batches of a step.
    """
    return Footprint(
        weights=bytes_of((*model.parameters(), *model.buffers())),
        gradients=bytes_of(trainable(model)),
        state_share=1.0,
        gradients_exist=parts > 1,
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What has gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of whole tensors, as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Unit:
    """What fully_shard gathers in one piece: a block, the rest of a tower, or the rest of the model."""

    parameters: Sequence[nn.Parameter]
    has_backward: bool
    """Whether the backward pass goes through it."""
    locked: bool = False
    """Of a tower that trains nothing, and runs once for a batch."""
    fetched_ahead: bool = False
    """Whether it is gathered in the backward pass for nothing: fully_shard fetches what ran before a unit while that is at work."""
    root: bool = False

    def numbers(self, parts: int, *, with_gradient: bool = False) -> int:
        """Numbers in it when the first side of each tensor is cut into equal parts, and filled up where it does not divide."""
        return sum(_cut_numbers(parameter, parts) for parameter in self.parameters if parameter.requires_grad or not with_gradient)


def _cut_numbers(tensor: Tensor, parts: int) -> int:
    first, *rest = tensor.shape
    return math.ceil(first / parts) * parts * math.prod(rest)


def units(model: Encoders) -> list[Unit]:
    """Every block, then what is left of every tower, then the rest but the temperatures: in the order of the forward pass."""
    taken = {id(parameter) for parameter in temperatures(model)}
    found: list[Unit] = []
    for tower in map(model.tower, model.modalities):
        reached = tower.locked == "no"  # by the backward pass
        for part in [*tower.blocks(), tower]:
            parameters = _left(part, taken)
            reached = reached or any(parameter.requires_grad for parameter in parameters)
            if reached and found and not found[-1].has_backward:
                found[-1] = replace(found[-1], fetched_ahead=True)
            found.append(Unit(parameters, has_backward=reached, locked=tower.locked == "wholly"))
    found.append(Unit(_left(model, taken), root=True, has_backward=True))
    return [unit for unit in found if unit.parameters]


def _left(module: nn.Module, taken: set[int]) -> list[nn.Parameter]:
    mine = [parameter for parameter in module.parameters() if id(parameter) not in taken]
    taken |= {id(parameter) for parameter in mine}
    return mine
