"""The exact loss on one rank: golden values, fitted pairs, precision, memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import textbook
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.contrast import ContrastOutput, ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives import Objective
from clipscale.objectives.cacr import Cacr
from clipscale.objectives.clip import Clip
from clipscale.objectives.cwcl import Cwcl
from clipscale.objectives.siglip import Siglip
from clipscale.objectives.soft_clip import SoftClip
from clipscale.parallel.mesh import Mesh

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "objectives.json").read_text())
DENSE, TILED = ContrastSettings(method="dense"), ContrastSettings(method="tiled", tile_rows=3, tile_columns=5)


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(objective: Objective, pairs: Pairs, scale: float | Tensor, bias: float | None = None, *, settings=TILED) -> ContrastOutput:
    number = None if bias is None else torch.tensor(bias, dtype=pairs.x.dtype)
    return contrastive_loss(objective, pairs, torch.as_tensor(scale), number, settings=settings, mesh=Mesh.single())


@pytest.mark.parametrize("settings", [DENSE, TILED], ids=["dense", "tiled"])
@pytest.mark.parametrize(
    ("key", "objective", "scale", "bias"),
    [
        ("clip", Clip(), 10.0, None),
        ("clip_s100", Clip(), 100.0, None),
        ("clip_label_smoothing_0.1", Clip(label_smoothing=0.1), 10.0, None),
        ("siglip", Siglip(), 10.0, -10.0),
        ("siglip_bias_0", Siglip(), 10.0, 0.0),
        ("cwcl", Cwcl(guided_by="first"), 10.0, None),
    ],
)
def test_objectives_reproduce_the_golden_values(key, objective, scale, bias, settings):
    expected = GOLDEN["values"][key]
    x, y = (float64(GOLDEN["inputs"][name]).requires_grad_() for name in ("x", "y"))
    leaf = float64(scale).requires_grad_()
    offset = None if bias is None else float64(bias).requires_grad_()
    pairs = Pairs(x, y, guide_x=float64(GOLDEN["inputs"]["u"]))
    output = contrastive_loss(objective, pairs, leaf, offset, settings=settings, mesh=Mesh.single())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected["value"], rel=1e-13)
    found = {"grad_x": x.grad, "grad_y": y.grad, "d_ds": leaf.grad, "d_db": None if offset is None else offset.grad}
    for name in expected.keys() - {"value"}:
        torch.testing.assert_close(found[name], float64(expected[name]), rtol=1e-9, atol=1e-10)  # golden gradients are finite differences


@pytest.mark.parametrize("settings", [DENSE, TILED], ids=["dense", "tiled"])
def test_cwcl_takes_its_weights_from_the_second_modality_unless_told_otherwise(settings):
    inputs = {name: float64(values) for name, values in GOLDEN["inputs"].items()}  # the golden weights are those of x
    x, y = inputs["y"].requires_grad_(), inputs["x"].requires_grad_()
    output = run(Cwcl(), Pairs(x, y, guide_y=inputs["u"]), float64(10.0), settings=settings)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(GOLDEN["values"]["cwcl"]["value"], rel=1e-13)
    torch.testing.assert_close(y.grad, float64(GOLDEN["values"]["cwcl"]["grad_x"]), rtol=1e-9, atol=1e-10)


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    x = torch.eye(3, dtype=torch.float64)[[0] * 7]
    assert run(Clip(), Pairs(x, x), 20.0).loss.item() == pytest.approx(math.log(7), rel=1e-14)
    assert run(Cwcl(), Pairs(x, x, guide_y=x), 20.0).loss.item() == pytest.approx(2 * math.log(7), rel=1e-14)
    assert run(Siglip(), Pairs(x, x), 10.0, -10.0).loss.item() == pytest.approx(7 * math.log(2), rel=1e-14)


def test_cwcl_with_sharp_weights_is_twice_clip():
    batch = textbook.make_batch(9)
    guide = torch.eye(9, dtype=torch.float64)  # weights 1 and 1/2; the 60th power leaves 1 and 1e-18
    cwcl = run(Cwcl(sharpen=60.0), Pairs(batch.x, batch.y, guide_y=guide), batch.scale).loss
    assert cwcl.item() == pytest.approx(2 * run(Clip(), Pairs(batch.x, batch.y), batch.scale).loss.item(), rel=1e-12)


# --- fitted pairs ------------------------------------------------------------------------------------------------------


def fitted(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = functional.normalize(torch.randn(96, 24, generator=draw, dtype=torch.float64), dim=1)
    y = functional.normalize(x + 0.02 * torch.randn(96, 24, generator=draw, dtype=torch.float64), dim=1)
    return x.to(dtype), y.to(dtype)


def exact_clip(x: Tensor, y: Tensor, scale: float) -> tuple[float, Tensor]:
    """Loss and d loss / d x in float64 without cancellation: the gradient at a pair is minus the sum of its row's (column's) others."""
    x, y = x.double(), y.double()
    logits = scale * x @ y.T
    others = ~torch.eye(len(x), dtype=torch.bool)
    gradient, loss = torch.zeros_like(logits), 0.0
    for dim in (0, 1):
        probability = logits.softmax(dim) * others
        gradient += probability - torch.diag(probability.sum(dim))
        loss += -torch.log1p(-probability.sum(dim)).sum().item()
    return loss / (2 * len(x)), scale * gradient @ y / (2 * len(x))


@pytest.mark.parametrize("settings", [DENSE, ContrastSettings(tile_rows=40, tile_columns=33)], ids=["dense", "tiled"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 4e-3)])
def test_gradients_of_fitted_pairs_keep_their_digits(dtype, bar, settings):
    x, y = fitted(dtype)  # bfloat16's own bar is half a unit in the last place of the gradients handed back, 2^-9, twice
    loss, gradient = exact_clip(x, y, 100.0)
    assert 0 < loss < 1e-6, "the pairs are not fitted"
    x.requires_grad_()
    found = run(Clip(), Pairs(x, y), torch.tensor(100.0, requires_grad=True), settings=settings).loss
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-4)
    assert float((x.grad.double() - gradient).norm() / gradient.norm()) <= bar


def test_the_usual_form_loses_fitted_pairs_so_the_test_above_can_fail():
    x, y = fitted(torch.float32)
    _, gradient = exact_clip(x, y, 100.0)
    x.requires_grad_()
    logits = 100.0 * x @ y.T
    targets = torch.arange(len(x))
    ((functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2).backward()
    assert float((x.grad.double() - gradient).norm() / gradient.norm()) >= 0.5


# --- precision and memory -----------------------------------------------------------------------------------------------


def test_scales_far_above_one_hundred_neither_overflow_nor_underflow():
    batch = textbook.make_batch(40, scale=3000.0).to(torch.float32)  # logits span ±3000, e^88 is the largest float32
    expected = textbook.gradients(textbook.clip, batch)
    x = batch.x.clone().requires_grad_()
    output = run(Clip(), Pairs(x, batch.y), batch.scale, settings=ContrastSettings(tile_rows=16, tile_columns=16))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert float((x.grad - expected["x"]).norm() / expected["x"].norm()) <= 1e-3  # a logit of 3000 is good to 2e-4 in float32


def test_bfloat16_embeddings_have_a_float32_loss():
    batch = textbook.make_batch(32).to(torch.bfloat16)
    expected = textbook.gradients(textbook.clip, batch)
    x = batch.x.clone().requires_grad_()
    output = run(Clip(), Pairs(x, batch.y), batch.scale.float())
    output.loss.backward()
    assert (output.loss.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert float((x.grad.double() - expected["x"]).norm() / expected["x"].norm()) <= 4e-3  # rounding of the gradient to bfloat16


def test_autocast_does_not_reach_the_loss():
    batch = textbook.make_batch(16).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(Clip(), Pairs(batch.x, batch.y), batch.scale).loss
    assert torch.equal(inside, run(Clip(), Pairs(batch.x, batch.y), batch.scale).loss)


def test_the_loss_takes_part_in_larger_expressions():
    batch = textbook.make_batch(8)
    leaf = batch.x.clone().requires_grad_()
    expected = textbook.gradients(textbook.clip, batch)["x"]
    (3 * run(Clip(), Pairs(leaf, batch.y), batch.scale).loss + leaf.sum()).backward()
    torch.testing.assert_close(leaf.grad, 3 * expected + 1, rtol=1e-12, atol=1e-13)


def test_a_single_pair_has_metrics_that_are_numbers():
    metrics = run(Clip(), Pairs(torch.ones(1, 1), torch.ones(1, 1)), 1.0).metrics
    expected = {"x_to_y_top1": 1.0, "y_to_x_top1": 1.0, "mean_positive": 1.0, "hardest_negative": -1.0}
    assert {name: value.item() for name, value in metrics.items()} == expected


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation produced."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize(
    "objective",
    [Clip(label_smoothing=0.1, same_text="ignored"), Siglip(), Cwcl(), SoftClip(), Cacr()],
    ids=["clip", "siglip", "cwcl", "soft_clip", "cacr"],
)
def test_nothing_larger_than_a_tile_or_the_embeddings_is_ever_held(objective):
    count, width, tile = 300, 8, 32
    batch = textbook.make_batch(count, width=width).to(torch.float32)
    x = batch.x.clone().requires_grad_()
    pairs = Pairs(x, batch.y, guide_y=batch.guide_y, ids=batch.ids)
    with LargestTensor() as largest:
        settings = ContrastSettings(tile_rows=tile, tile_columns=tile)
        contrastive_loss(objective, pairs, batch.scale, batch.bias, settings=settings, mesh=Mesh.single()).loss.backward()
    assert largest.elements <= max(count * width, tile * tile) < count * count // 30


@pytest.mark.parametrize("wrong", [{"tile_rows": 0}, {"grid_rows": 0}, {"method": "sparse"}, {"tile": 3}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ContrastSettings.model_validate(wrong)
