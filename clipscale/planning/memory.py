"""Memory: what a rank holds at the fullest moments of a step, by what it is.

Weights, gradients and averages by counting; the optimizer's state by letting the optimizer take a step on shapes; activations by running
the towers on shapes (passes.py); what an engine adds by its own word (Engine.footprint); the loss by contrast/cost.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from clipscale.config import Run
from clipscale.contrast.cost import Cost, cost_of
from clipscale.engines._footprint import Footprint, StepShape, bytes_of, trainable
from clipscale.optim import Place
from clipscale.planning.ledger import Ledger
from clipscale.planning.passes import Passes, shapes_of
from clipscale.run_model import steps_differ

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Layout:
    """How a run's rows and ranks are arranged."""

    world: int
    data_ranks: int
    ranks_per_node: int
    micro_batch: int
    """Rows of a pair kind encoded at a time."""
    share: int
    """Rows of the largest pair kind that a rank has."""

    @property
    def parts(self) -> int:
        """Micro-batches; 1: all rows in one graph."""
        return math.ceil(self.share / self.micro_batch)


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be fullest."""

    name: str
    bytes: Mapping[str, int]
    """By what they are."""

    @property
    def total(self) -> int:
        """Bytes in use."""
        return sum(self.bytes.values())


@dataclass
class State:
    """What the optimizer keeps of a whole model, and needs besides for a step."""

    bytes: int
    while_stepping: int


@dataclass
class Sizes:
    """A run's model, and its passes on shapes, remembered."""

    run: Run
    device: Device
    passes: dict[str, Passes] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = shapes_of(self.run)
        self.state = state_of(self.run)

    def pass_by(self, rounding: Literal["autocast", "weights"]) -> Passes:
        """The towers' passes when the precision comes about in this way."""
        if rounding not in self.passes:
            self.passes[rounding] = Passes(self.run, device=self.device, rounding=rounding)
        return self.passes[rounding]

    def sample_flops(self, kind: str) -> float:
        """FLOPs of a pair in its towers, forwards and backwards, nothing counted twice."""
        if kind not in self.flops:
            towers = {modality: tower.model_copy(update={"recompute": None}) for modality, tower in self.run.towers.items()}
            plain = self.run.model_copy(update={"towers": towers})
            once = self.pass_by("autocast") if plain == self.run else Passes(plain, device=self.device, rounding="autocast")
            taken = once.train({kind: 4}, held=True)
            self.flops[kind] = sum((*taken.forward.flops, *taken.backward.flops)) / 4
        return self.flops[kind]

    def footprint(self, layout: Layout) -> Footprint:
        """What the run's engine holds and sends."""
        run = self.run
        shape = StepShape(layout.world, layout.parts, run.precision, run.optimizer, steps_differ(run))
        return run.engine.footprint(self.model, shape)

    def costs(self, layout: Layout, *, grid_rows: int | None = None) -> dict[str, Cost]:
        """Of every pair kind's loss, on the run's own grid or one with so many rows."""
        contrast = self.run.contrast if grid_rows is None else self.run.contrast.model_copy(update={"grid_rows": grid_rows})
        return {
            name: cost_of(
                kind.objective,
                contrast,
                kind.global_batch,
                self.run.embed_dim,
                world=layout.data_ranks,
                ranks_per_node=min(layout.ranks_per_node, layout.data_ranks),
                dtype=torch.float32,
                device=self.device,
            )
            for name, kind in self.run.pair_kinds.items()
        }


def state_of(run: Run) -> State:
    """By a step of the run's optimizer on shapes; of one that looks at numbers, on a real tensor of each shape."""
    shapes = shapes_of(run)
    places = shapes.places()
    named = {name: parameter for name, parameter in shapes.named_parameters() if parameter.requires_grad}
    try:
        with FakeTensorMode():
            return _stepped(run, {name: (parameter.shape, 1) for name, parameter in named.items()}, places)
    except DataDependentOutputException:
        alike: dict[tuple[torch.Size, bool], list[str]] = {}
        for name, parameter in named.items():
            alike.setdefault((parameter.shape, places[name].in_block), []).append(name)
        return _stepped(run, {names[0]: (shape, len(names)) for (shape, _), names in alike.items()}, places)


def _stepped(run: Run, shapes: Mapping[str, tuple[torch.Size, int]], places: Mapping[str, Place]) -> State:
    """A first step of the optimizer over weights of these shapes, each of which stands for so many."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, (shape, _) in shapes.items()}
    optimizer = run.optimizer.build(parameters.items(), places=places, fused=False)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with Ledger() as ledger:
        optimizer.step()
    kept = {name: sum(t.nbytes for t in optimizer.state[weight].values() if isinstance(t, Tensor)) for name, weight in parameters.items()}
    return State(sum(kept[name] * count for name, (_, count) in shapes.items()), max(0, ledger.peak - sum(kept.values())))


def moments(sizes: Sizes, layout: Layout, *, anchor: int | None = None) -> list[Moment]:
    """The moments of a step, as it goes.

    Args:
        anchor: estimate activations from those of so many rows and half as many, instead of counting them.
    """
    run, footprint = sizes.run, sizes.footprint(layout)
    average = bytes_of(trainable(sizes.model)) if run.optimizer.average_decay is not None else 0
    always = {
        "weights": footprint.weights,
        "optimizer state": round(sizes.state.bytes * footprint.state_share),
        "average of weights": round(average * footprint.state_share),
        **footprint.always,
    }
    stepping = round(sizes.state.while_stepping * footprint.state_share) if sizes.device == "cpu" else 0  # GPUs step by one kernel
    found = [
        *_of_towers(sizes, layout, footprint, anchor),
        Moment("optimizer", {"gradients": footprint.gradients, "optimizer at work": stepping}),
    ]
    return [Moment(moment.name, {name: size for name, size in {**always, **moment.bytes}.items() if size}) for moment in found]


def _of_towers(sizes: Sizes, layout: Layout, footprint: Footprint, anchor: int | None) -> list[Moment]:
    passes = sizes.pass_by(footprint.rounding)
    take = passes.train if anchor is None else partial(passes.estimate, anchor=anchor)
    rows = {name: kind.global_batch // layout.data_ranks for name, kind in sizes.run.pair_kinds.items()}
    held = footprint.gradients if footprint.gradients_exist else 0
    loss = max(cost.memory_bytes for cost in sizes.costs(layout).values())
    embeddings = sum(2 * count * sizes.run.embed_dim * 4 for count in rows.values())
    if layout.parts == 1:
        whole, inputs = take(rows, held=footprint.gradients_exist, again=False), passes.input_bytes(rows)
        kept = {**footprint.while_towers_run, "inputs": inputs}
        return [
            Moment("contrast", {**kept, "gradients": held, "activations": whole.kept, "contrast": loss}),
            Moment(
                "backward",
                {
                    **kept,
                    "gradients": held + whole.gradients_at_peak,
                    "activations": whole.peak - whole.gradients_at_peak,
                    "gradients of embeddings": embeddings,
                },
            ),
        ]
    part = {name: math.ceil(count / layout.parts) for name, count in rows.items()}
    again, inputs = take(part, held=True, again=True), passes.input_bytes(part)
    cached = {"embeddings": embeddings, "gradients of embeddings": embeddings}
    return [
        Moment("contrast", {"embeddings": embeddings, "contrast": loss}),
        Moment(
            "backward",
            {**footprint.while_towers_run, "gradients": footprint.gradients, "inputs": inputs, "activations": again.peak, **cached},
        ),
    ]


def fullest(sizes: Sizes, layout: Layout, *, anchor: int | None = None) -> Moment:
    """The moment at which a step holds most."""
    return max(moments(sizes, layout, anchor=anchor), key=lambda moment: moment.total)
