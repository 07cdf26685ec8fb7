"""Timing: seconds of a step by a roofline over every operator and every exchange, with stated assumptions.

An operator takes as long as its products at the reachable share of the GPU's rate, or its bytes at the reachable share of its memory's
bandwidth, or as long as starting it (Williams et al. 2009, doi:10.1145/1498765.1498785). Operators of towers are those counted on shapes
(passes.py), what is made again included; compilation fuses some, and is not told of. Exchanges take their bytes over the links they cross;
those of gradients and weights go on while towers compute, as far as `HIDDEN` of that time goes. What the data loader, evaluations and
checkpoints take comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from clipscale.contrast.cost import Cost
from clipscale.engines._footprint import Collective, bytes_of, trainable
from clipscale.planning.gpus import Gpu
from clipscale.planning.ledger import Work
from clipscale.planning.memory import Layout, Sizes

HIDDEN = 0.8
"""Share of a pass's time in which exchanges can hide; an assumption: the first gradients are ready late, and the last ones wait."""


@dataclass(frozen=True)
class Exchange:
    """What a rank receives in a step for one purpose."""

    what: str
    kind: str
    node_bytes: int
    """From ranks of its node."""
    network_bytes: int
    """From other nodes, on the rank that receives the most from there; of a ring's bytes its node's share by GPU."""
    hidden: bool

    @property
    def bytes(self) -> int:
        """All that it receives."""
        return self.node_bytes + self.network_bytes

    def seconds(self, gpu: Gpu) -> float:
        """Over both links at the share of their rate that collectives reach."""
        return (self.node_bytes / gpu.node_gb_s + self.network_bytes / gpu.network_gb_s) / 1e9 / gpu.links


@dataclass(frozen=True)
class StepSeconds:
    """A step in which every pair kind takes its share: those that are rarer than every step by their share of steps."""

    by_phase: Mapping[str, float]
    flops: float
    """Of the model, on one rank, nothing counted twice."""

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.by_phase.values())


def exchanges(sizes: Sizes, layout: Layout) -> list[Exchange]:
    """What the engine and every pair kind's loss send."""
    engine = [_by_link(collective, layout) for collective in sizes.footprint(layout).collectives if collective.ranks > 1]
    losses = [
        Exchange(f"loss of {name}", "gathers and exchanges", cost.bytes_intra_node, cost.bytes_inter_node, hidden=False)
        for name, cost in sizes.costs(layout).items()
        if layout.data_ranks > 1
    ]
    return engine + losses


def _by_link(collective: Collective, layout: Layout) -> Exchange:
    """Rings through all members, as many as a node has members: each node receives the ring's bytes once, shared by its members."""
    neighbours = max(1, min(collective.ranks, layout.ranks_per_node // collective.stride))
    nodes = collective.ranks // neighbours
    passes = 2 if collective.kind == "all_reduce" else 1
    network = passes * collective.bytes * (nodes - 1) // nodes // neighbours if nodes > 1 else 0
    network = min(network, collective.received)
    return Exchange(collective.what, collective.kind, collective.received - network, network, collective.hidden)


def step_seconds(sizes: Sizes, layout: Layout, gpu: Gpu) -> StepSeconds:
    """A step's phases on this GPU."""
    run = sizes.run
    passes = sizes.pass_by(sizes.footprint(layout).rounding)
    rate = gpu.flops(run.precision)
    phases = {"encode": 0.0, "backward": 0.0, "contrast": 0.0}
    flops = 0.0
    costs = sizes.costs(layout)
    for name, kind in run.pair_kinds.items():
        share = 1 / kind.every
        rows = kind.global_batch // layout.data_ranks
        part = {name: math.ceil(rows / layout.parts)}
        count = rows / part[name] * share
        trained = passes.train(part, held=True, again=layout.parts > 1)
        once = 2 if layout.parts > 1 else 1  # cached gradients encode twice
        phases["encode"] += once * count * seconds_of(trained.forward, gpu, rate)
        phases["backward"] += count * seconds_of(trained.backward, gpu, rate)
        phases["contrast"] += share * _of_loss(costs[name], run.contrast.feature_dtype, gpu)
        flops += share * rows * sizes.sample_flops(name) + share * costs[name].flops
    phases["optimizer"] = _of_optimizer(sizes, layout, gpu)
    phases["communication"] = _exposed(exchanges(sizes, layout), gpu, phases, layout)
    return StepSeconds(phases, flops)


def seconds_of(work: Work, gpu: Gpu, rate: float) -> float:
    """The roofline over operators."""
    flops, moved = work.columns()
    each = np.maximum(flops / (rate * gpu.products), moved / (gpu.memory_gb_s * 1e9 * gpu.streaming))
    return float(np.maximum(each, gpu.launch_us / 1e6).sum())


def _of_loss(cost: Cost, feature_dtype: str | None, gpu: Gpu) -> float:
    rate = gpu.flops("bf16" if feature_dtype is not None else "fp32")
    return cost.flops / (rate * gpu.products)


def _of_optimizer(sizes: Sizes, layout: Layout, gpu: Gpu) -> float:
    """Gradients are read for their norm and for the step, weights and state read and written."""
    footprint, weights = sizes.footprint(layout), bytes_of(trainable(sizes.model))
    share = footprint.state_share or 1 / layout.data_ranks
    average = 3 * weights * share if sizes.run.optimizer.average_decay is not None else 0
    moved = 2 * footprint.gradients + 2 * weights * share + 2 * sizes.state.bytes * share + average
    return moved / (gpu.memory_gb_s * 1e9 * gpu.streaming)


def _exposed(sent: Iterable[Exchange], gpu: Gpu, phases: Mapping[str, float], layout: Layout) -> float:
    """Seconds that ranks wait: gradients hide behind the last micro-batch's pass, the loss's exchanges behind nothing."""
    sent = list(sent)
    hideable = sum(exchange.seconds(gpu) for exchange in sent if exchange.hidden)
    behind = HIDDEN * (phases["encode"] / (2 if layout.parts > 1 else 1) + phases["backward"]) / layout.parts
    return sum(exchange.seconds(gpu) for exchange in sent if not exchange.hidden) + max(0.0, hideable - behind)
