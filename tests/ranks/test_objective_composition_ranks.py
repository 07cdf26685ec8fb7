"""Objectives added up by configuration are the weighted sum of their textbook forms: value, every gradient, any ranks, any grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

Weighted = list[tuple[float, Callable[[textbook.Batch], Tensor]]]
CASES: dict[str, tuple[dict[str, Any], Weighted]] = {
    "a bias for one alone, statistics, sums after the sweep": (
        {"name": "siglip", "add": [{"name": "cross_uniformity", "weight": 0.5}, {"name": "dclw", "negatives": "both", "sigma": 0.3}]},
        [(1, textbook.siglip), (0.5, textbook.cross_uniformity), (1, textbook.dclw_two_view)],
    ),
    "second sweeps, further views, captions, a guide": (
        {
            "name": "decoupled",
            "add": [
                {"name": "soft_clip", "targets": "first", "target_temperature": 0.2, "weight": 0.25},
                {"name": "mv_infonce", "num_views": 3, "weight": 2.0},
                {"name": "inverse_propensity", "power": 0.5},
                {"name": "cwcl", "weight": 3.0},
                {"name": "mv_dhel", "form": "code"},  # of two views, where another part has three
            ],
        },
        [
            (1, textbook.decoupled),
            (0.25, textbook.soft_clip),
            (2, textbook.mv_infonce),
            (1, textbook.inverse_propensity),
            (3, textbook.cwcl),
            (1, textbook.mv_dhel_code),
        ],
    ),
    "the same objective twice, and regularisers": (
        {
            "name": "uniformity",
            "add": [{"name": "uniformity", "sharpness": 3.0, "weight": 0.3}, "alignment", {"name": "multi_label", "weight": 5.0}],
        },
        [(1, textbook.uniformity), (0.3, partial(textbook.uniformity, sharpness=3.0)), (1, textbook.alignment), (5, textbook.multi_label)],
    ),
}
SIZES = {1: [13], 4: [5, 0, 4, 4], 6: [2, 3, 1, 0, 4, 3]}
LEAVES = ("x", "y", "z", "scale", "bias")


def expected(parts: Weighted, batch: textbook.Batch) -> Tensor:
    return torch.stack([weight * loss(batch).reshape(()) for weight, loss in parts]).sum()


def compute(mesh: Mesh, name: str, method: str) -> dict[str, Any]:
    objective, batch = Objective.model_validate(CASES[name][0]), textbook.make_batch(13, scale=9.0)
    start = sum(SIZES[mesh.world][: mesh.rank])
    rows = slice(start, start + SIZES[mesh.world][mesh.rank])
    own = {leaf: getattr(batch, leaf).clone() for leaf in LEAVES}
    own = {leaf: (tensor if tensor.numel() == 1 else tensor[rows]).requires_grad_() for leaf, tensor in own.items()}
    pairs = Pairs(own["x"], own["y"], guide_y=batch.guide_y[rows], ids=batch.ids[rows], views={"z": own["z"]})
    settings = ContrastSettings(method=method, tile_rows=3, tile_columns=4)
    loss = contrastive_loss(objective, pairs, own["scale"], own["bias"], settings=settings, mesh=mesh).loss
    loss.backward()
    return {"loss": loss.item(), **{leaf: torch.zeros_like(own[leaf]) if own[leaf].grad is None else own[leaf].grad for leaf in LEAVES}}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world", "method"), [(1, "dense"), (1, "tiled"), (4, "dense"), (4, "grid"), (6, "grid")])
def test_a_composition_is_the_weighted_sum_of_its_parts(ranks, name, world, method):
    wanted = textbook.gradients(partial(expected, CASES[name][1]), textbook.make_batch(13, scale=9.0))
    answers = ranks(world)(compute, name, method)
    for answer in answers:
        assert answer["loss"] == pytest.approx(wanted["loss"].item(), rel=1e-12)
    for leaf in LEAVES:
        parts = [answer[leaf] for answer in answers]
        found = sum(parts) if leaf in ("scale", "bias") else torch.cat(parts)
        assert (found - wanted[leaf]).abs().max() <= 1e-11 * wanted[leaf].abs().max().clamp(min=1e-3), leaf
