"""Plan: what a run will hold, send, take and cost on so many GPUs, told from its settings alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clipscale.config import Run
from clipscale.errors import ConfigError
from clipscale.parallel.mesh import grid_shape
from clipscale.planning.goodput import COPY_BYTES_S, GPU_HOURS, LEAST_STALL_S, Goodput, goodput
from clipscale.planning.gpus import Gpu
from clipscale.planning.memory import Layout, Moment, Sizes, fullest, moments
from clipscale.planning.timing import Exchange, StepSeconds, exchanges, step_seconds

ANCHOR = 64
"""Rows from which activations are estimated when the run names no micro-batch."""
DECODED_PER_CORE = {"image": 900.0, "speech": 500.0, "text": 20_000.0}
"""Samples that a core reads and decodes in a second: pictures of 256 pixels, 10 s of FLAC, captions; an assumption."""
STORED_BYTES = {"image": 30_000, "speech": 120_000, "text": 100}
"""Mean size of a sample in its shards: JPEG of 256 pixels, 10 s of FLAC at 16 kHz, a caption; an assumption."""


@dataclass(frozen=True)
class Reading:
    """What the data loader must bring."""

    samples_per_second: float
    """Pairs, of all ranks."""
    megabytes_per_second: float
    """From stores, of all ranks."""
    cores: int
    """That decode on each node."""


@dataclass(frozen=True)
class Plan:
    """A run on so many nodes of one kind of GPU."""

    run: Run
    gpu_name: str
    gpu: Gpu
    nodes: int
    layout: Layout
    moments: Sequence[Moment]
    largest_micro_batch: int
    """Rows that fit at a time; 0: not even one does."""
    exchanges: Sequence[Exchange]
    grid: tuple[int, int]
    """Of the loss, as the run has it."""
    best_grid: tuple[int, int]
    """With the least time on the links."""
    step: StepSeconds
    goodput: Sequence[Goodput]
    checkpoint_bytes: int
    reading: Reading

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.layout.world

    @property
    def fullest(self) -> Moment:
        """The moment at which a rank holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether that is what a rank may hold."""
        return self.fullest.total <= self.gpu.limit_bytes

    @property
    def samples_per_step(self) -> float:
        """Pairs; of kinds that are rarer than every step, their mean."""
        return sum(kind.global_batch / kind.every for kind in self.run.pair_kinds.values())

    @property
    def samples_per_second(self) -> float:
        """Pairs of all ranks."""
        return self.samples_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPU could do at most (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return self.step.flops / self.step.total / self.gpu.flops(self.run.precision)

    @property
    def hours(self) -> float:
        """Of the whole run, without interruptions and checkpoints."""
        return self.run.steps * self.step.total / 3600

    @property
    def expected_hours(self) -> float:
        """With checkpoints as set and interruptions at the higher published rate."""
        share = min(each.share_as_set for each in self.goodput)
        return self.hours / share if share else math.inf

    @property
    def dollars(self) -> float:
        """What the expected hours cost."""
        return self.expected_hours * self.gpus * self.gpu.dollars_per_hour


class Planner:
    """Plans of one run on one kind of GPU; what is counted once serves every number of nodes."""

    def __init__(self, run: Run, *, gpu_name: str, gpu: Gpu, gpus_per_node: int) -> None:
        """
        Raises:
            RequestError: the run's model cannot be made, or the GPU does not know its precision.
        """
        gpu.flops(run.precision)
        self.run, self.gpu_name, self.gpu, self.gpus_per_node = run, gpu_name, gpu, gpus_per_node
        self.sizes = Sizes(run, gpu.device)

    def plan(self, nodes: int) -> Plan:
        """
        Raises:
            RequestError: the run cannot be shared by so many ranks, or its engine does not tell.
        """
        world = nodes * self.gpus_per_node
        self.run.check_world(world)
        fits = self._largest(world)
        layout = self._layout(world, self._asked(world, fits))
        step = step_seconds(self.sizes, layout, self.gpu)
        checkpoint = self._checkpoint_bytes()
        stall = max(LEAST_STALL_S, checkpoint / COPY_BYTES_S)
        interval = self.run.checkpoints.seconds_between(step.total)
        return Plan(
            run=self.run,
            gpu_name=self.gpu_name,
            gpu=self.gpu,
            nodes=nodes,
            layout=layout,
            moments=moments(self.sizes, layout),
            largest_micro_batch=fits,
            exchanges=exchanges(self.sizes, layout),
            grid=grid_shape(layout.data_ranks, self.run.contrast.grid_rows),
            best_grid=self._best_grid(layout),
            step=step,
            goodput=[goodput(rate, gpus=world, save_s=stall, interval_s=interval) for rate in GPU_HOURS],
            checkpoint_bytes=checkpoint,
            reading=self._reading(step, nodes),
        )

    def _layout(self, world: int, micro_batch: int) -> Layout:
        data_ranks = self.run.engine.data_ranks(world)
        share = max(kind.global_batch for kind in self.run.pair_kinds.values()) // data_ranks
        return Layout(world, data_ranks, min(self.gpus_per_node, world), min(micro_batch, share), share)

    def _asked(self, world: int, fits: int) -> int:
        """Rows at a time, as the run has it."""
        whole = self._layout(world, 2**62).share
        if self.run.micro_batch == "auto":
            return max(1, fits)
        return min(self.run.micro_batch or whole, whole)

    def _largest(self, world: int) -> int:
        """The most rows that fit, of those that a share can be cut into; 0 when not even one does."""
        share = self._layout(world, 2**62).share
        limit = self.gpu.limit_bytes
        if self.run.micro_batch == "auto" and self.run.memory_gb is not None:
            limit = min(limit, int(self.run.memory_gb * 2**30))
        asked = self.run.micro_batch if isinstance(self.run.micro_batch, int) else ANCHOR
        anchor = max(2, min(share, asked))

        def fits(parts: int) -> bool:
            layout = self._layout(world, math.ceil(share / parts))
            return fullest(self.sizes, layout, anchor=anchor).total <= limit

        low, high = 1, share  # parts: few hold much
        if not fits(share):
            return 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return math.ceil(share / low)

    def _best_grid(self, layout: Layout) -> tuple[int, int]:
        ranks = layout.data_ranks
        shapes = [(rows, ranks // rows) for rows in range(1, ranks + 1) if ranks % rows == 0]

        def seconds(shape: tuple[int, int]) -> float:
            costs = self.sizes.costs(layout, grid_rows=shape[0]).values()
            return sum(cost.bytes_intra_node / self.gpu.node_gb_s + cost.bytes_inter_node / self.gpu.network_gb_s for cost in costs)

        own = grid_shape(ranks, self.run.contrast.grid_rows)
        return min([own, *shapes], key=seconds)  # the first of equals: the run's own where none is better

    def _checkpoint_bytes(self) -> int:
        """Weights, the optimizer's state and the average, whole, as rank 0 writes them."""
        weights = sum(parameter.numel() * 4 for parameter in self.sizes.model.parameters())
        averaged = sum(parameter.numel() * 4 for parameter in self.sizes.model.parameters() if parameter.requires_grad)
        return weights + self.sizes.state.bytes + averaged * (self.run.optimizer.average_decay is not None)

    def _reading(self, step: StepSeconds, nodes: int) -> Reading:
        rates = {name: kind.global_batch / kind.every / step.total for name, kind in self.run.pair_kinds.items()}
        stored = {name: sum(STORED_BYTES[modality] for modality in self.run.pair_kinds[name].modalities) for name in rates}
        cores = sum(rate / DECODED_PER_CORE[modality] for name, rate in rates.items() for modality in self.run.pair_kinds[name].modalities)
        megabytes = sum(rate * stored[name] for name, rate in rates.items()) / 1e6
        return Reading(sum(rates.values()), megabytes, math.ceil(cores / nodes))


@dataclass(frozen=True)
class Row:
    """One number of nodes of a sweep."""

    nodes: int
    plan: Plan | None
    refused: str = ""
    """Why there is no plan."""


def sweep(planner: Planner, nodes: int) -> list[Row]:
    """Plans on 1, 2, 4, ... nodes, and on the last number asked for."""
    counts = sorted({*(2**power for power in range(nodes.bit_length()) if 2**power <= nodes), nodes})
    rows = []
    for count in counts:
        try:
            rows.append(Row(count, planner.plan(count)))
        except ConfigError as error:
            rows.append(Row(count, None, str(error)))
    return rows
