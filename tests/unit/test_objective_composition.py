"""Objectives as a configuration names them: added up, written down again, refused with a reason; and what each is in special cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from pydantic import ValidationError
from tiny import tiny_run, write_squares
from torch import Tensor

from clipscale import train
from clipscale.config import Run, validate
from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.errors import ConfigError, ContrastError
from clipscale.metrics import read_json_lines
from clipscale.objectives import Objective
from clipscale.objectives.clip import Clip
from clipscale.objectives.dcl import Dcl
from clipscale.parallel.mesh import Mesh
from clipscale.settings import part_names

CLIP = Clip()


def loss_of(objective: Any, batch: textbook.Batch) -> Tensor:
    pairs = Pairs(batch.x, batch.y, guide_x=batch.guide_x, guide_y=batch.guide_y, ids=batch.ids)
    objective = Objective.model_validate(objective)
    return contrastive_loss(objective, pairs, batch.scale, batch.bias, settings=ContrastSettings(), mesh=Mesh.single()).loss


# --- configuration ------------------------------------------------------------------------------------------------------


def test_a_composition_is_written_down_as_it_is_read():
    written = {
        "name": "clip",
        "label_smoothing": 0.1,
        "same_text": "negative",
        "add": [{"name": "alignment", "weight": 1.0}, {"name": "uniformity", "sharpness": 3.0, "weight": 0.5}],
    }
    short = {"name": "clip", "label_smoothing": 0.1, "add": ["alignment", {"name": "uniformity", "weight": 0.5, "sharpness": 3.0}]}
    for objective in (Objective.model_validate(short), Objective.model_validate(written)):
        assert objective.model_dump() == written
        assert objective.model_dump(mode="json", serialize_as_any=True) == written  # as a run folder keeps it


def test_adding_nothing_is_the_objective_alone():
    assert Objective.model_validate({"name": "clip", "add": []}) == CLIP


@pytest.mark.parametrize(
    ("settings", "place", "said"),
    [
        ({"name": "clip", "add": [{"name": "uniformity", "weight": -1.0}]}, ("add", 0, "weight"), "greater than 0"),
        ({"name": "clip", "add": [{"name": "uniformity", "sharpnes": 1.0}]}, ("add", 0, "sharpnes"), "did you mean 'sharpness'"),
        ({"name": "clip", "add": ["alignment", "unifomity"]}, ("add", 1), "did you mean 'uniformity'"),
        ({"name": "clip", "add": {"name": "uniformity"}}, ("add",), "it must be a list"),
        ({"name": "clip", "label": 1, "add": ["uniformity"]}, ("label",), "there is no such setting"),
        ({"name": "clip", "add": ["cwcl", {"name": "cwcl", "guided_by": "first"}]}, (), "take their weights from different towers"),
        ({"name": "cwcl", "add": [{"name": "cwcl", "centre": True}]}, (), "differ in `centre`"),
        (
            {"name": "clip", "add": [{"name": "m2_grouped", "num_groups": 2}]},
            (),
            "'m2_grouped' cut the batch into different groups",
        ),
    ],
)
def test_what_cannot_be_added_up_is_refused_where_it_stands(settings, place, said):
    with pytest.raises(ValidationError) as caught:
        Objective.model_validate(settings)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert said in error["msg"]


@pytest.mark.parametrize("name", part_names(Objective.folder))
def test_no_setting_of_an_objective_has_the_name_of_a_compositions(name):
    assert not {"add", "weight", "name"} & type(Objective.model_validate(name)).model_fields.keys()


def test_a_run_refuses_a_part_that_asks_for_what_it_has_not(tmp_path):
    def run(objective: object) -> Run:
        settings = tiny_run(tmp_path, tmp_path)
        settings["towers"]["text"]["locked"] = False
        settings["towers"]["text"].pop("cached_rows")
        settings["pair_kinds"]["image_text"]["objective"] = objective
        return validate(Run, settings)

    with pytest.raises(ConfigError, match=r"objective 'gram' asks for further views of every pair \(z\)"):
        run({"name": "clip", "add": [{"name": "gram", "num_views": 3}]})
    with pytest.raises(ConfigError, match=r"objective 'supcon' asks for numbers of every pair \(label\)"):
        run({"name": "clip", "add": ["uniformity", {"name": "supcon", "positives": "label"}]})
    with pytest.raises(ConfigError, match="objective 'cwcl' takes its weights from the locked text tower"):
        run({"name": "clip", "add": ["cwcl"]})


def test_the_loss_names_the_part_that_lacks_something():
    batch = textbook.make_batch(4)
    objective = Objective.model_validate({"name": "clip", "add": ["decoupled"]})
    with pytest.raises(ContrastError, match="objective Decoupled needs caption ids"):
        contrastive_loss(objective, Pairs(batch.x, batch.y), batch.scale, settings=ContrastSettings(), mesh=Mesh.single())


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), samples=24)


def test_every_objective_trains_in_a_run_added_to_clip(tmp_path, squares):
    settings = tiny_run(tmp_path, squares, steps=2)
    (kind,) = settings["pair_kinds"].values()
    names = part_names(Objective.folder)
    settings["pair_kinds"] = {name: kind | {"objective": {"name": "clip", "add": [name]}} for name in names}
    run = validate(Run, settings)
    assert train.train(run, Mesh.single()) == train.Outcome("finished", 2)
    first, last = read_json_lines(run.run_folder / "metrics.jsonl")
    losses = [(first["kinds"][name]["loss"], last["kinds"][name]["loss"]) for name in names]
    assert all(math.isfinite(after) and after != before for before, after in losses)


# --- special cases ------------------------------------------------------------------------------------------------------


def different_captions(count: int = 9) -> textbook.Batch:
    batch = textbook.make_batch(count)
    batch.ids = torch.arange(count)
    return batch


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "focal", "gamma": 0.0},
        {"name": "margin", "margin": 0.0},
        {"name": "inverse_propensity", "power": 0.0},
        {"name": "inverse_propensity", "power": 1.0},
        {"name": "soft_clip", "target_temperature": 0.002},
    ],
    ids=lambda objective: objective["name"],
)
def test_it_is_clip_where_its_paper_says_so(objective):
    batch = different_captions()
    assert loss_of(objective, batch).item() == pytest.approx(textbook.clip(batch).item(), rel=1e-12)


def test_the_captions_of_twins_count_as_one_at_full_inverse_propensity():
    batch = textbook.make_batch(5)
    batch.x[4], batch.y[4], batch.ids = batch.x[3], batch.y[3], torch.tensor([0, 1, 2, 3, 3])
    logits = batch.scale * batch.x @ batch.y.T
    total = 0.0
    for side in (logits.exp(), logits.T.exp()):
        strangers = [side[row, :4].sum() / side[row, row] for row in (0, 1, 2)]  # the twins once
        twin = (side[3, :3].sum() + 1.5 * side[3, 3]) / side[3, 3]  # the own pair whole, the other twin half
        total += torch.stack([*strangers, twin, twin]).log().mean().item() / 2
    assert loss_of("inverse_propensity", batch).item() == pytest.approx(total, rel=1e-12)


def test_rgcl_is_dcl_at_a_price():
    batch = different_captions()
    temperature, dcl = 1 / batch.scale.item(), loss_of(Dcl(), batch).item()
    assert loss_of({"name": "rgcl", "rho": 3.0}, batch).item() == pytest.approx(2 * temperature * (dcl - math.log(8) + 3.0), rel=1e-9)


def test_z_loss_does_not_change_with_shift_and_scale():
    batch = textbook.make_batch(9)
    wider = textbook.make_batch(9, scale=70.0)
    moved = {"name": "z_loss", "b": 0.7, "a": 2.0}
    assert loss_of(moved, wider).item() == pytest.approx(loss_of(moved, batch).item(), rel=1e-12)


def test_orthonormal_pairs_have_the_values_of_a_hand_calculation():
    x = torch.eye(6, dtype=torch.float64)
    batch = textbook.make_batch(6, scale=5.0)
    batch.x, batch.y = x, x.clone()
    assert loss_of("alignment", batch).item() == pytest.approx(0, abs=1e-15)
    assert loss_of("uniformity", batch).item() == pytest.approx(-4)  # −sharpness · ‖e_i − e_j‖²
    assert loss_of({"name": "cross_uniformity", "sharpness": 3.0}, batch).item() == pytest.approx(-6)
    assert loss_of("cacr", batch).item() == pytest.approx(-2)  # attraction 0, every negative at squared distance 2
    volumes = loss_of({"name": "gram", "label_smoothing": 0.0, "epsilon": 0.0}, batch).item()
    assert volumes == pytest.approx(math.log1p(5 * math.exp(-5)))


def test_volumes_of_fitted_pairs_have_finite_gradients():
    batch = textbook.make_batch(6)
    leaf = batch.x.clone().requires_grad_()
    batch.x, batch.y = leaf, batch.x.clone()
    (gradient,) = torch.autograd.grad(loss_of("gram", batch), leaf)
    assert gradient.isfinite().all()
