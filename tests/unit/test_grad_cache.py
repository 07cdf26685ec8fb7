"""Gradient caching on one rank: what runs twice, what runs once, and what is in memory meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_steps import WHOLLY_LOCKED, Steps, seed, trainable_for
from live_memory import peak_bytes
from torch import Tensor

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.memory.grad_cache import cached_backward, split
from clipscale.model import KindOutput, PreparedKinds
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

MESH = Mesh.single()


def backward(steps: Steps, *, objective: str = "clip", settings: ContrastSettings | None = None, prepare: Any = None) -> Any:
    """A cached backward pass on a fresh model: the model, and a function that runs it."""
    trainable, _ = trainable_for(MESH, steps)
    rows = steps.rows(trainable.model, step=0, rank=0)

    def contrast(outputs: dict[str, KindOutput]) -> tuple[Tensor, None]:
        return loss_of(outputs["pairs"], objective, settings or ContrastSettings()), None

    def run() -> None:
        assert steps.micro_batch is not None
        more = {} if prepare is None else {"prepare": prepare}
        cached_backward(trainable, rows, contrast, micro_batch=steps.micro_batch, seed=lambda number: seed(0, 0, number), **more)

    return trainable.model, run


def loss_of(output: KindOutput, objective: str, settings: ContrastSettings) -> Tensor:
    """With every input that an objective can ask for: captions come in pairs, guides from the locked tower."""
    ids = torch.arange(len(output.x)) // 2
    pairs = Pairs(x=output.x, y=output.y, guide_x=output.guide_x, guide_y=output.guide_y, ids=ids)
    return contrastive_loss(Objective.model_validate(objective), pairs, output.scale, output.bias, settings=settings, mesh=MESH).loss


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("objective", ["cwcl", {"name": "clip", "same_text": "ignored"}], ids=["guide", "ids"])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_locked_towers_guides_and_caption_ids_give_the_gradient_of_one_graph(objective: Any, micro_batch: int) -> None:
    steps = Steps(towers=WHOLLY_LOCKED, micro_batch=micro_batch)
    model, run = backward(steps, objective=objective)
    run()
    whole = steps.make()
    outputs = []
    for number, part in enumerate(split(steps.rows(whole, step=0, rank=0), micro_batch=micro_batch)):
        seed(0, 0, number)
        outputs.append(whole(part)["pairs"])
    joined = {name: torch.cat([getattr(output, name) for output in outputs]) for name in ("x", "y", "features_y")}
    loss_of(replace(outputs[0], **joined), objective, ContrastSettings(method="dense")).backward()
    expected, found = gradients(whole), gradients(model)
    assert found.keys() == expected.keys()
    assert not [name for name in found if name.startswith("towers.text")]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)


def test_a_locked_tower_runs_once_with_each_micro_batch_and_a_trained_one_twice() -> None:
    model, run = backward(Steps(towers=WHOLLY_LOCKED, micro_batch=2, batch=8))
    runs = dict.fromkeys(model.towers, 0)
    for name, tower in model.towers.items():
        tower.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    run()
    assert runs == {"image": 2 * 4, "text": 4}


def test_rows_are_prepared_micro_batch_by_micro_batch_and_those_of_a_locked_tower_once() -> None:
    asked: list[tuple[str, int]] = []

    def prepare(part: PreparedKinds) -> PreparedKinds:
        asked.extend((modality, len(next(iter(tensors.values())))) for modality, tensors in part["pairs"].items())
        return part

    _, run = backward(Steps(towers=WHOLLY_LOCKED, micro_batch=3, batch=6), prepare=prepare)
    run()
    assert sorted(asked) == [("image", 3)] * 4 + [("text", 3)] * 2


def test_memory_grows_with_the_batch_by_its_embeddings_and_their_gradients_alone() -> None:
    tiles = ContrastSettings(tile_rows=64, tile_columns=64, cache_bytes=0)

    def peak(batch: int) -> int:
        _, run = backward(Steps(dtype="float32", batch=batch, micro_batch=64), settings=tiles)
        return peak_bytes(run)

    a_row = 2 * 2 * 16 * 4  # x and y, each with its gradient: 16 numbers of 4 bytes
    assert (peak(512) - peak(256)) / 256 == pytest.approx(a_row, rel=0.1)
