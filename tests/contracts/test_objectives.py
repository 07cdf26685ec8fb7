"""Every objective, found by its file: any tiles give the dense result, gradients are those of the loss, and needs are true."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import textbook
import torch

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.contrast.layout import as_parts, numbers_of
from clipscale.errors import ContrastError
from clipscale.objectives import Block, Objective
from clipscale.parallel.mesh import Mesh
from clipscale.settings import find_part, part_names

NAMES = part_names("clipscale.objectives")
DETACHED = {"Dclw": "its weights are constants for the gradient, by definition"}
DENSE = ContrastSettings(method="dense")


@pytest.fixture(params=NAMES)
def objective(request) -> Objective:
    return find_part(Objective, request.param)()


def loss_of(objective: Objective, batch: textbook.Batch, settings: ContrastSettings = DENSE) -> torch.Tensor:
    given = {"guide_x": batch.guide_x, "guide_y": batch.guide_y, "ids": batch.ids}
    pairs = Pairs(batch.x, batch.y, **given, views={"z": batch.z}, numbers={"label": batch.ids})
    return contrastive_loss(objective, pairs, batch.scale, batch.bias, settings=settings, mesh=Mesh.single()).loss


def leaves_and_gradients(objective: Objective, batch: textbook.Batch, settings: ContrastSettings) -> tuple[torch.Tensor, ...]:
    leaves = [leaf.clone().requires_grad_() for leaf in (batch.x, batch.y, batch.scale, batch.bias)]
    batch = dataclasses.replace(batch, x=leaves[0], y=leaves[1], scale=leaves[2], bias=leaves[3])
    loss = loss_of(objective, batch, settings)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("tile_rows", "tile_columns"), [(1, 1), (4, 7), (7, 3), (100, 100)])
def test_uneven_tiles_give_the_dense_loss_and_gradients(objective, tile_rows, tile_columns):
    batch = textbook.make_batch(17)
    tiles = ContrastSettings(method="tiled", tile_rows=tile_rows, tile_columns=tile_columns)
    for found, expected in zip(leaves_and_gradients(objective, batch, tiles), leaves_and_gradients(objective, batch, DENSE), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # rounding of other orders of addition


@pytest.mark.parametrize("leaf", ["x", "y", "scale", "bias"])
def test_gradients_are_the_differences_of_the_loss(objective, leaf):
    if type(objective).__name__ in DETACHED:
        pytest.skip(f"{type(objective).__name__}: {DETACHED[type(objective).__name__]}; the oracle's gradient is tested instead")
    batch = textbook.make_batch(6)
    direction = torch.randn(getattr(batch, leaf).shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = 1e-5
    ahead, behind = (
        loss_of(objective, dataclasses.replace(batch, **{leaf: getattr(batch, leaf) + sign * step * direction})) for sign in (1, -1)
    )
    gradients = dict(zip(("loss", "x", "y", "scale", "bias"), leaves_and_gradients(objective, batch, ContrastSettings()), strict=True))
    slope = (gradients[leaf] * direction).sum()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)  # third derivative × step²


def test_the_order_of_pairs_does_not_matter(objective):
    batch = textbook.make_batch(11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    moved = dataclasses.replace(batch, **{name: getattr(batch, name)[order] for name in ("x", "y", "guide_x", "guide_y", "ids", "z")})
    torch.testing.assert_close(loss_of(objective, moved, ContrastSettings(tile_rows=4)), loss_of(objective, batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["dense", "tiled"])
def test_a_single_pair_has_a_finite_loss_and_gradient(objective, method):
    for number in leaves_and_gradients(objective, textbook.make_batch(1), ContrastSettings(method=method)):
        assert torch.isfinite(number).all()


def test_terms_are_the_same_for_an_empty_block(objective):
    def block(rows: int, columns: int) -> Block:
        numbers = torch.full((rows, columns), 0.5)
        products = dict.fromkeys(objective.products, numbers)
        known = dict.fromkeys(numbers_of(objective), (torch.full((rows, 1), 0.5), torch.full((1, columns), 0.5)))
        return Block(products, positive=numbers > 1, same_text=numbers > 1, guide=numbers, scale=torch.tensor(2.0), numbers=known)

    empty, full = (as_parts(objective.terms(block(*shape))) for shape in ((0, 0), (3, 5)))
    kinds = [{name: [(type(term), term.side) for term in parts] for name, parts in terms.items()} for terms in (empty, full)]
    assert kinds[0] == kinds[1]


def test_what_it_needs_is_demanded_and_nothing_else_is(objective):
    batch = textbook.make_batch(4)
    offers = {"guide": "guide_y", "first_guide": "guide_x", "ids": "ids"}
    given = {name: getattr(batch, field) if need in objective.needs else None for need, field in offers.items() for name in (field,)}
    bias = batch.bias if "bias" in objective.needs else None

    def call(pairs: Pairs, bias: torch.Tensor | None) -> None:
        contrastive_loss(objective, pairs, batch.scale, bias, settings=ContrastSettings(), mesh=Mesh.single())

    call(Pairs(batch.x, batch.y, **given), bias)
    for need in objective.needs:
        less = given if need == "bias" else given | {offers[need]: None}
        with pytest.raises(ContrastError, match=f"objective {type(objective).__name__} needs"):
            call(Pairs(batch.x, batch.y, **less), None if need == "bias" else bias)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_by_name_and_says_where_it_comes_from(name):
    part = find_part(Objective, name)
    assert Objective.model_validate(name) == part()
    source = importlib.import_module(part.__module__).__doc__
    assert "arXiv:" in source
    assert all(field.description for field in part.model_fields.values())
