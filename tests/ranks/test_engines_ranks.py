"""Every engine takes the steps that plain torch takes on one process: weights, moments, temperature, losses and norms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_steps import CONVNEXT, LOCKED, SPEECH, WHOLLY_LOCKED, Steps, Trained, largest_difference, plain_steps, train_steps

from clipscale.engines import Engine
from clipscale.parallel.mesh import Mesh

CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"name": "local"}, {"micro_batch": 2}),
    (2, {"name": "ddp"}, {"micro_batch": 5}),
    (2, {"name": "ddp"}, {"towers": WHOLLY_LOCKED, "micro_batch": 2}),
    (2, {"name": "fsdp2"}, {}),
    (2, {"name": "fsdp2"}, {"micro_batch": 1, "recompute": True}),
    (2, {"name": "fsdp2"}, {"towers": WHOLLY_LOCKED, "micro_batch": 2}),
    (2, {"name": "fsdp2", "gathered": "block"}, {"micro_batch": 5, "recompute": {"keep_mb": 1}}),
    (2, {"name": "fsdp2", "cpu_offload": True}, {"micro_batch": 2, "clip_norm": None}),
    (3, {"name": "fsdp2"}, {"towers": CONVNEXT, "batch": 2, "steps": 1}),
    (4, {"name": "fsdp2", "shard_ranks": 2}, {"micro_batch": 2}),
    (4, {"name": "fsdp2", "shard_ranks": 2, "gathered": "block"}, {"micro_batch": 5}),
    (2, {"name": "fsdp2", "tensor_ranks": 2}, {"micro_batch": 2, "recompute": {"part": "attention"}}),
    (4, {"name": "fsdp2", "tensor_ranks": 2}, {"micro_batch": 5}),
    (4, {"name": "fsdp2", "tensor_ranks": 2, "shard_ranks": 1, "gathered": "block"}, {"towers": SPEECH, "micro_batch": 2}),
    (2, {"name": "fsdp2"}, {"towers": SPEECH}),
    (2, {"name": "deepspeed", "stage": 1}, {}),
    (2, {"name": "deepspeed", "stage": 2}, {"micro_batch": 1, "recompute": {"every": 2}}),
    (2, {"name": "deepspeed", "stage": 2, "offload_optimizer": True}, {"micro_batch": 5}),
    (3, {"name": "deepspeed", "stage": 3}, {"towers": WHOLLY_LOCKED, "micro_batch": 2}),
    (2, {"name": "deepspeed", "stage": 3}, {"towers": LOCKED, "micro_batch": 5, "recompute": True}),
]
"""(ranks, engine, what differs from Steps). Dropout is always on: of patches in the ViT, of activations in the speech tower."""


def label(value: Any) -> str:
    """A case's test id."""
    return "-".join(f"{key}={item}" for key, item in value.items() if key != "towers") if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("world", "engine", "changes"), CASES, ids=label)
def test_an_engine_takes_the_steps_of_plain_torch(ranks, world: int, engine: dict[str, Any], changes: dict[str, Any]) -> None:
    deepspeed = engine["name"] == "deepspeed"  # steps in fp32
    steps = Steps(engine=engine, dtype="float32" if deepspeed else "float64", **changes)
    expected = plain_steps(steps, data_ranks=Engine.model_validate(engine).data_ranks(world))
    answers: list[Trained] = ranks(world)(train_steps, steps)
    assert largest_difference(answers[0], expected) < (1e-5 if deepspeed else 1e-10)
    assert all(answer.losses == answers[0].losses and answer.norms == answers[0].norms for answer in answers), "all ranks know the same"


@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "fsdp2", "tensor_ranks": 2}, {"name": "deepspeed", "stage": 1}], ids=label)
def test_twenty_steps_in_fp32_follow_the_curve_of_plain_torch(ranks, engine: dict[str, Any]) -> None:
    steps = Steps(engine=engine, dtype="float32", steps=20, batch=5, micro_batch=2)
    expected = plain_steps(steps, data_ranks=Engine.model_validate(engine).data_ranks(2))
    found: Trained = ranks(2)(train_steps, steps)[0]
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "fsdp2"}, {"name": "deepspeed", "stage": 3}], ids=label)
def test_bf16_stays_near_fp32_and_keeps_temperature_and_moments_in_fp32(ranks, engine: dict[str, Any]) -> None:
    steps = Steps(engine=engine, dtype="float32", precision="bf16", clip_norm=None, lr=1e-3, batch=128, steps=1)
    exact: Trained = ranks(2)(train_steps, replace(steps, precision="fp32"))[0]
    rounded: Trained = ranks(2)(train_steps, steps)[0]
    assert rounded.losses != exact.losses
    assert rounded.losses[0] == pytest.approx(exact.losses[0], rel=2e-3), "rounding of single embeddings averages out over 256 pairs"
    assert {tensor.dtype for tensors in rounded.state.values() for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("optimizer", "tolerance"), [("lamb", 1e-10), ("muon", 5e-2)])
def test_an_optimizer_steps_on_parts_of_the_weights_as_on_whole_ones(ranks, optimizer: str, tolerance: float) -> None:
    """Muon makes steps orthogonal in bf16: in parts, products are rounded at other places."""
    changes = {"name": optimizer, "layer_decay": 0.8, "average_decay": 0.7}
    steps = Steps(optimizer_changes=changes, engine={"name": "ddp"}, steps=1 if optimizer == "muon" else 2)
    whole: Trained = ranks(2)(train_steps, steps)[0]
    parts: Trained = ranks(2)(train_steps, replace(steps, engine={"name": "fsdp2"}))[0]
    assert largest_difference(parts, whole) < tolerance
    average = whole.state["average"]
    assert largest(whole.state["model"], average) > 1e-4, "the average lags behind"
    assert largest(parts.state["average"], average) < tolerance


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to each tensor's largest number, of the tensors that `other` holds."""
    return max(float((one[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-9)) for name, tensor in other.items())


@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "fsdp2"}], ids=label)
def test_fp16_stays_near_fp32_and_saves_its_scale(ranks, engine: dict[str, Any]) -> None:
    steps = Steps(engine=engine, dtype="float32", clip_norm=None, lr=1e-9, batch=64, steps=8)
    exact: Trained = ranks(2)(train_steps, steps)[0]
    rounded: Trained = ranks(2)(train_steps, replace(steps, precision="fp16"))[0]
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=2e-3)
    whole = [step for step, norm in enumerate(rounded.norms) if math.isfinite(norm)]
    assert 0 < len(whole) < 8, "the first scale is too large for these gradients, and is halved until they fit"
    assert [rounded.norms[step] for step in whole] == pytest.approx([exact.norms[step] for step in whole], rel=2e-2)
    assert float(rounded.state["optimizer"]["loss_scale/value"]) == 2.0 ** (16 - (8 - len(whole)))


def test_fsdp2_starts_from_the_weights_of_one_process(ranks) -> None:
    start = Steps(steps=0, dtype="float32")
    alone: Trained = ranks(1)(train_steps, start)[0]
    shared: Trained = ranks(2)(train_steps, replace(start, engine={"name": "fsdp2"}))[0]
    assert alone.state["model"].keys() == shared.state["model"].keys()
    assert all(torch.equal(shared.state["model"][name], weight) for name, weight in alone.state["model"].items())


def built_on(mesh: Mesh, steps: Steps) -> set[str]:
    """Which devices the model that an engine builds lies on, before it is wrapped."""
    return {tensor.device.type for tensor in Engine.model_validate(steps.engine).build(steps.make, mesh).parameters()}


def test_fsdp2_builds_the_model_on_rank_0_only(ranks) -> None:
    assert ranks(2)(built_on, Steps(engine={"name": "fsdp2"})) == [{"cpu"}, {"meta"}]
