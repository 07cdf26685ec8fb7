"""What a plan says of bytes between ranks is what ranks receive: every collective of a step counted on gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_steps import LOCKED, VIT, WHOLLY_LOCKED, Steps, step_once, trainable_for
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.contrast import ContrastSettings
from clipscale.contrast.cost import cost_of
from clipscale.engines import Engine
from clipscale.engines._footprint import StepShape
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

IMAGE_LOCKED = {**VIT, "image": {**VIT["image"], "locked": True}}


class Received(TorchDispatchMode):
    """Bytes that this rank receives in collectives: of a gather or an exchange what others hold, of sums what rings bring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_allgather_base_":
            self.bytes += args[0].nbytes - args[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.bytes += args[1].nbytes - args[0].nbytes
        elif name == "alltoall_base_":
            self.bytes += args[0].nbytes - args[0].nbytes // len(args[3])
        elif name == "allreduce_":
            ranks = torch.distributed.ProcessGroup.unbox(args[1]).size()
            self.bytes += 2 * sum(tensor.nbytes for tensor in args[0]) * (ranks - 1) // ranks
        elif function.namespace == "c10d" and name != "barrier":
            raise AssertionError(f"{name} is not counted")
        return made


def received(mesh: Mesh, steps: Steps) -> int:
    """In one step; those before it let engines settle."""
    trainable, data = trainable_for(mesh, steps)
    for step in range(2):
        step_once(trainable, data, steps, step)
    with Received() as counter:
        step_once(trainable, data, steps, 2)
    return counter.bytes


def planned(steps: Steps, *, world: int) -> int:
    """By what the engine and the loss tell."""
    engine = Engine.model_validate(steps.engine)
    with torch.device("meta"):
        model = steps.make()
    parts = 1 if steps.micro_batch is None else -(-steps.batch // steps.micro_batch)
    shape = StepShape(world=world, parts=parts, precision=steps.precision, optimizer=steps.optimizer(), steps_differ=False)
    sent = engine.footprint(model, shape).collectives
    loss = cost_of(
        Objective.model_validate("clip"),
        ContrastSettings(),
        steps.batch * world,
        model.embed_dim,
        world=world,
        ranks_per_node=None,
        dtype=torch.float32,
    )
    return sum(collective.received for collective in sent) + loss.bytes_total


@pytest.mark.parametrize(
    ("world", "engine", "changes"),
    [
        (4, {"name": "ddp", "bucket_mb": 1}, {"micro_batch": 3}),
        (2, {"name": "ddp"}, {"towers": WHOLLY_LOCKED}),
        (2, {"name": "fsdp2"}, {"micro_batch": 2, "precision": "bf16"}),
        (4, {"name": "fsdp2", "shard_ranks": 2}, {"micro_batch": 4}),
        (2, {"name": "fsdp2", "gathered": "block"}, {"towers": IMAGE_LOCKED}),
        (2, {"name": "fsdp2", "gathered": "block"}, {"towers": IMAGE_LOCKED, "micro_batch": 4}),
        (2, {"name": "fsdp2", "gathered": "block"}, {"micro_batch": 3, "towers": LOCKED}),
        (2, {"name": "fsdp2", "gathered": "block"}, {"micro_batch": 4, "towers": WHOLLY_LOCKED, "recompute": True}),
        (4, {"name": "fsdp2", "gathered": "block", "shard_ranks": 2}, {"micro_batch": 4}),
        (2, {"name": "deepspeed", "stage": 1}, {"micro_batch": 2}),
        (2, {"name": "deepspeed", "stage": 2}, {"towers": LOCKED}),
    ],
    ids=lambda value: (
        "-".join(str(part) for part in value.values() if not isinstance(part, dict)) if isinstance(value, dict) else str(value)
    ),
)
def test_ranks_receive_the_bytes_that_are_planned(ranks, world: int, engine: dict[str, Any], changes: dict[str, Any]) -> None:
    steps = Steps(**{"engine": engine, "dtype": "float32", "batch": 8, **changes})
    assert set(ranks(world)(received, steps)) == {planned(steps, world=world)}
