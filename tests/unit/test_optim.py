"""Optimizer groups and the schedule's arithmetic."""

from __future__ import annotations

import math

import pytest
from torch import nn

from clipscale.optim import Optimizer, Schedule


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
    decayed, plain = Optimizer(lr=1e-3, weight_decay=0.3).build(model.named_parameters(), fused=False).param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert [tuple(parameter.shape) for parameter in plain["params"]] == [(4,), (4,), (4,), (2,)]
