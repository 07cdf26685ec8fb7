"""Optimizers against their papers' formulas, parameter groups, averages, loss scaling, and the schedule's arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipscale.engines._replicated import Replica
from clipscale.model import Encoders, PairKindModel, build_encoders
from clipscale.optim import Optimizer, Place, Schedule
from clipscale.towers import Tower


def test_the_schedule_rises_linearly_then_falls_like_a_cosine() -> None:
    schedule = Schedule(shape="cosine", warmup_steps=10, final_fraction=0.1)
    assert schedule.fraction(5, steps=110) == 0.5
    assert schedule.fraction(10, steps=110) == 1.0
    assert schedule.fraction(60, steps=110) == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert schedule.fraction(35, steps=110) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert schedule.fraction(110, steps=110) == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "middle", "end"), [("linear", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_other_shapes(shape: str, middle: float, end: float) -> None:
    schedule = Schedule.model_validate({"shape": shape})
    assert schedule.fraction(50, steps=100) == pytest.approx(middle)
    assert schedule.fraction(100, steps=100) == pytest.approx(end)


def test_weight_decay_reaches_matrices_only_and_locked_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    made = Optimizer.model_validate({"lr": 1e-3, "weight_decay": 0.3}).build(model.named_parameters(), fused=False)
    decayed, plain = made.param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert [tuple(parameter.shape) for parameter in plain["params"]] == [(4,), (4,), (4,), (2,)]


def test_each_block_learns_slower_than_the_next_one() -> None:
    """BEiT's rule: decay to the power of the blocks between a weight and the output, embeddings beyond the first block."""
    model = tiny_encoders()
    optimizer = Optimizer.model_validate({"lr": 1.0, "layer_decay": 0.5}).build(
        model.named_parameters(), places=model.places(), fused=False
    )
    factors = {id(parameter): group["lr_factor"] for group in optimizer.param_groups for parameter in group["params"]}
    by_name = {name: factors[id(parameter)] for name, parameter in model.named_parameters()}
    expected = {  # two blocks: a convolution and a transformer block
        "towers.image.transformer.0.mlp.0.weight": 0.5,
        "towers.image.stem.0.0.weight": 0.125,
        "towers.image.stem.1.weight": 0.25,
        "towers.image.positions": 0.0625,
        "towers.image.norm.weight": 1.0,
        "projections.image.weight": 1.0,
        "log_scale.pairs": 1.0,
    }
    assert {name: by_name[name] for name in expected} == expected


WEIGHT = torch.tensor([[0.5, -1.0, 2.0], [0.25, 1.5, -0.75]], dtype=torch.float64)
GRADIENTS = [torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.05, -0.6]]).double(), torch.tensor([[-0.3, 0.1, 0.2], [0.2, -0.4, 0.1]]).double()]
LR = 0.1


def taken(settings: dict[str, Any], *, in_block: bool = False) -> Tensor:
    """The weight after two steps."""
    weight = nn.Parameter(WEIGHT.clone())
    optimizer = Optimizer.model_validate({"lr": LR, **settings})
    made = optimizer.build([("w", weight)], places={"w": Place(in_block=in_block)}, fused=False)
    for gradient in GRADIENTS:
        weight.grad = gradient.clone()
        made.step()
    return weight.detach()


def adam_directions(beta1: float, beta2: float, eps: float) -> list[Tensor]:
    """Kingma & Ba's bias-corrected steps: their moments as weighted means of all gradients so far."""
    directions = []
    for count in (1, 2):
        weights = {beta: torch.tensor([beta ** (count - 1 - t) for t in range(count)]).double() for beta in (beta1, beta2)}
        seen = torch.stack(GRADIENTS[:count])
        first = (weights[beta1][:, None, None] * seen).sum(0) / weights[beta1].sum()
        second = (weights[beta2][:, None, None] * seen**2).sum(0) / weights[beta2].sum()
        directions.append(first / (second.sqrt() + eps))
    return directions


def test_adamw_takes_the_papers_steps() -> None:
    expected = WEIGHT
    for direction in adam_directions(0.8, 0.9, 1e-3):
        expected = expected - LR * direction - LR * 0.3 * expected
    assert torch.allclose(taken({"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3}), expected, rtol=1e-6), "float32 counts of steps"


def test_lamb_takes_the_papers_steps() -> None:
    """Algorithm 2: a step on a tensor has the length of the tensor, weight decay included."""
    expected = WEIGHT
    for direction in adam_directions(0.8, 0.9, 1e-3):
        update = direction + 0.3 * expected
        expected = expected - LR * expected.norm() / update.norm() * update
    assert torch.allclose(taken({"name": "lamb", "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3}), expected, rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 2.0], ids=["of the weights' size", "of the least size"])
def test_adafactor_takes_the_papers_steps(eps: float) -> None:
    """Algorithm 4, with steps relative to the weights' root mean square and without warm-up."""
    expected, rows, columns = WEIGHT, torch.zeros(2).double(), torch.zeros(3).double()
    for count, gradient in enumerate(GRADIENTS, start=1):
        keep = 1 - count**-0.8
        rows = keep * rows + (1 - keep) * (gradient**2).sum(1)
        columns = keep * columns + (1 - keep) * (gradient**2).sum(0)
        update = gradient / (torch.outer(rows, columns) / rows.sum()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        size = max(eps, float(expected.square().mean().sqrt()))
        expected = expected - size * min(LR, count**-0.5) * update
    assert torch.allclose(taken({"name": "adafactor", "eps": eps}), expected, rtol=1e-6)


def test_muon_takes_nearly_orthogonal_steps_inside_blocks_and_adamws_outside() -> None:
    """Of the momentum's singular values the iteration leaves numbers near one (Jordan: 0.5 to 1.5); steps are 0.2 √(larger side) long."""
    outside = taken({"name": "muon", "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.0})
    assert torch.equal(outside, taken({"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.0}))
    weight = nn.Parameter(WEIGHT.float())
    settings = {"name": "muon", "lr": LR, "weight_decay": 0.0, "momentum": 0.6}
    made = Optimizer.model_validate(settings).build([("w", weight)], places={"w": Place(in_block=True)}, fused=False)
    first, second = (gradient.float() for gradient in GRADIENTS)
    kept = [0.4 * first, 0.6 * 0.4 * first + 0.4 * second]
    for gradient, momentum in zip((first, second), kept, strict=True):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        made.step()
        left, _, right = torch.linalg.svd(0.4 * gradient + 0.6 * momentum, full_matrices=False)  # Nesterov's
        inside = left.T @ (before - weight.detach()) / (LR * 0.2 * math.sqrt(3)) @ right.T
        assert torch.allclose(inside - torch.diag(inside.diagonal()), torch.zeros(2, 2), atol=0.05), "the same singular vectors, in bf16"
        assert ((inside.diagonal() > 0.5) & (inside.diagonal() < 1.5)).all()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lamb", "muon"])
def test_a_resumed_optimizer_takes_the_steps_of_one_that_went_on(name: str) -> None:
    def replica() -> Replica:
        optimizer = Optimizer.model_validate({"name": name, "lr": 0.01, "average_decay": 0.9, "clip_norm": 0.5})
        return Replica(tiny_encoders(), optimizer, torch.device("cpu"), precision="fp32")

    def step(trained: Replica, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in trained.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        trained.step(lr=0.01)

    once, again = replica(), replica()
    for seed in (1, 2):
        step(once, seed)
    step(again, 1)
    saved = {file: {key: value.clone() for key, value in tensors.items()} for file, tensors in again.state().items()}
    resumed = replica()
    resumed.load(saved)
    step(resumed, 2)
    ours, theirs = resumed.state(), once.state()
    assert all(torch.equal(ours[file][key], theirs[file][key]) for file in theirs for key in theirs[file])
    assert ours.keys() == theirs.keys() == {"model", "optimizer", "average"}


def test_the_average_is_the_weighted_mean_of_all_weights_so_far() -> None:
    optimizer = Optimizer.model_validate({"lr": 0.1, "average_decay": 0.75})
    trained = Replica(tiny_encoders(), optimizer, torch.device("cpu"), precision="fp32")
    name, parameter = next((name, parameter) for name, parameter in trained.model.named_parameters() if "mlp" in name)
    seen = [parameter.detach().clone()]
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        trained.step(lr=0.1)
        seen.append(parameter.detach().clone())
    expected = 0.75**3 * seen[0] + 0.25 * (0.75**2 * seen[1] + 0.75 * seen[2] + seen[3])
    assert torch.allclose(trained.state()["average"][name], expected, rtol=1e-5)


def test_norms_are_of_each_tower_and_clipping_is_of_all_together() -> None:
    trained = Replica(tiny_encoders(), Optimizer.model_validate({"lr": 0.1, "clip_norm": 1.0}), torch.device("cpu"), precision="fp32")
    model = trained.model
    model.log_scale["pairs"].grad = torch.tensor([2.0])
    model.projections["image"].weight.grad = torch.full_like(model.projections["image"].weight, 0.0)
    model.projections["image"].weight.grad[0, 0] = 4.0
    model.projections["text"].weight.grad = torch.zeros_like(model.projections["text"].weight)
    model.projections["text"].weight.grad[0, 0] = 4.0
    stepped = trained.step(lr=0.1)
    assert stepped.norms == {"image": 4.0, "text": 4.0, "temperature": 2.0}
    assert stepped.norm == 6.0
    first = trained.state()["optimizer"]["log_scale.pairs/exp_avg"]
    assert first.item() == pytest.approx((1 - 0.9) * 2.0 / 6.0, rel=1e-4), "the first moment saw the clipped gradient"


def test_fp16_leaves_out_steps_that_overflow_and_halves_the_scale() -> None:
    trained = Replica(tiny_encoders(), Optimizer.model_validate({"lr": 0.1}), torch.device("cpu"), precision="fp16")
    before = {name: tensor.clone() for name, tensor in trained.state()["model"].items()}
    weight = trained.model.log_scale["pairs"]
    trained.backward(weight.sum() * float("inf"))
    stepped = trained.step(lr=0.1)
    assert (stepped.skipped, stepped.loss_scale, stepped.norm) == (True, 2.0**16, math.inf)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state()["model"].items())
    trained.backward(3 * weight.sum())
    assert weight.grad.item() == 3 * 2.0**15
    stepped = trained.step(lr=0.1)
    assert (stepped.skipped, stepped.loss_scale, stepped.norm) == (False, 2.0**15, 3.0)
    resumed = Replica(tiny_encoders(), Optimizer.model_validate({"lr": 0.1}), torch.device("cpu"), precision="fp16")
    resumed.load(trained.state())
    resumed.backward(resumed.model.log_scale["pairs"].sum())
    assert resumed.step(lr=0.1).loss_scale == 2.0**15
    for _ in range(16):
        resumed.backward(resumed.model.log_scale["pairs"].sum() * float("nan"))
        stepped = resumed.step(lr=0.1)
    assert not stepped.skipped, "at a scale of one the gradients themselves are no numbers"


def tiny_encoders() -> Encoders:
    """A convolutional image tower of a halving, a widening and a transformer block, beside a text projection."""
    image = Tower.model_validate({"name": "conv_image", "image_size": 8, "channels": [4], "width": 8, "layers": 1, "heads": 2})
    text = Tower.model_validate({"name": "conv_image", "image_size": 8, "channels": [4], "width": 8, "layers": 1, "heads": 2})
    kinds = {"pairs": PairKindModel(modalities=("image", "text"))}
    return build_encoders({"image": image, "text": text}, embed_dim=4, pair_kinds=kinds, seed=0)
