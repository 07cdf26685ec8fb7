"""Bytes between ranks in a step: under cached gradients, micro-batches cost none, but where a setting trades them for memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from engine_steps import Steps, step_once, trainable_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.parallel.mesh import Mesh


class CountBytes(TorchDispatchMode):
    """Bytes that this rank hands to collectives, by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.bytes[function.overloadpacket.__name__] += max(sum(tensor.nbytes for tensor in tensors(item)) for item in args)
        return function(*args, **(kwargs or {}))


def tensors(item: Any) -> Iterable[Tensor]:
    """The tensors in an argument of a collective: the whole side of a gather or scatter is the larger argument."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for inner in item:
            yield from tensors(inner)


def count_bytes(mesh: Mesh, steps: Steps, micro_batches: list[int | None]) -> list[dict[str, int]]:
    """Of one step with each size of micro-batches, the first steps left out: engines settle in them."""
    trainable, data = trainable_for(mesh, steps)
    counts = []
    for micro_batch in micro_batches:
        for step in range(4):
            with CountBytes() as counter:
                step_once(trainable, data, replace(steps, micro_batch=micro_batch), step)
        counts.append(dict(counter.bytes))
    return counts


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "ddp"},
        {"name": "fsdp2"},
        {"name": "deepspeed", "stage": 1},
        {"name": "deepspeed", "stage": 2},
    ],
    ids=lambda engine: "-".join(str(value) for value in engine.values()),
)
def test_micro_batches_move_no_further_bytes(ranks, engine: dict[str, Any]) -> None:
    steps = Steps(engine=engine, dtype="float32", batch=8)
    one, four = ranks(2)(count_bytes, steps, [8, 2])[0]
    weights = sum(parameter.numel() for parameter in steps.make().parameters()) * 4
    assert sum(one.values()) > weights, "gradients were counted"
    assert sum(four.values()) == sum(one.values())


def test_what_is_gathered_block_by_block_is_gathered_for_every_micro_batch(ranks) -> None:
    steps = Steps(engine={"name": "fsdp2", "gathered": "block"}, dtype="float32", batch=8)
    one, four = ranks(2)(count_bytes, steps, [8, 2])[0]
    kind = "_allgather_base_"
    weights = sum(parameter.numel() for parameter in steps.make().parameters()) * 4
    assert one[kind] == pytest.approx(3 * weights, rel=0.05), "to embed, to encode again, and backwards"
    assert four[kind] == pytest.approx(4 * 3 * weights, rel=0.05)
