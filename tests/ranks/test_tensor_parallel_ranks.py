"""Towers whose blocks can be cut over tensor ranks give the features and gradients of the whole one; others are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from engine_steps import ARCHITECTURES, feed
from small_models import write_tokenizer
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.parallel.mesh import Mesh
from clipscale.parallel.parts import own_part, part_like, whole
from clipscale.parallel.tensor_parallel import Region
from clipscale.settings import part_names
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

EXAMPLES = Path(__file__).parent.parent / "contracts" / "towers"
REFUSED = {
    ("conv_image", 2): r"its blocks \(Conv2d, _Stage\)",
    ("hf_speech", 4): "WavLMEncoderLayer.attention has gru_rel_pos_const, gru_rel_pos_linear, rel_attn_embed",
    ("hf_text", 4): r"its blocks \(T5Block\)",
    ("hf_text", 5): r"its blocks \(GPT2Block\)",
    ("open_clip_image", 2): r"its blocks \(Bottleneck\)",
    ("open_clip_image", 3): r"its blocks \(ConvNeXtBlock, Sequential\)",
}
"""Examples (tower, number) that cannot be cut, and what the message names."""
CUSTOM = {"name": "open_clip_text", "architecture": "small-custom-text"}
TIMM = {"name": "open_clip_image", "architecture": "small-timm-vit"}
DROPOUT_INSIDE = ("hf_text", "hf_speech")
"""Towers that draw dropout inside attention while training: those draws belong to a rank's own heads and cannot be the whole tower's."""


def build(settings: dict[str, Any]) -> TowerModule:
    """A small tower in fp64, the same on every rank."""
    for folder in ARCHITECTURES:
        open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return Tower.model_validate(settings).build().double()


def gradients(tower: TowerModule, orders: dict[str, Tensor], *, training: bool) -> dict[str, Tensor]:
    """Features, and gradients of a number that depends on all of them, whole and in the order of checkpoints."""
    inputs = feed(tower.input, 3, torch.Generator().manual_seed(1))
    tower.train(training)
    torch.manual_seed(2)
    features = tower({name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()})
    (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)).sum().backward()
    found = {"features": features.detach()}
    for name, parameter in tower.named_parameters():
        if parameter.grad is not None:
            found[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
            found[name][orders.get(name, slice(None))] = whole(parameter.grad)
    return found


def compare(mesh: Mesh, settings: dict[str, Any], training: bool) -> float:
    """The largest difference between the whole tower and the same one cut over all ranks, relative to the largest gradient."""
    one, other = build(settings), build(settings)
    other.check_tensor_ranks(mesh.world)
    orders = other.cut(mesh.device_mesh({"copies": 1, "parts": 1, "tensor": mesh.world})["tensor"])
    with torch.no_grad():
        for name, order in orders.items():
            weights: nn.Parameter = one.get_parameter(name)
            own_part(other.get_parameter(name)).copy_(own_part(part_like(weights[order], other.get_parameter(name))))
    expected, got = gradients(one, {}, training=training), gradients(other, orders, training=training)
    assert expected.keys() == got.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((expected[name] - got[name]).abs().max()) for name in expected) / largest


def examples() -> list[Any]:
    """(name, settings, what a refusal names) of every tower's small examples, and of two families of open_clip that those leave out."""
    found = [pytest.param("open_clip_text", CUSTOM, None, id="custom-text"), pytest.param("open_clip_image", TIMM, None, id="timm-vit")]
    for name in part_names("clipscale.towers"):
        file = EXAMPLES / f"{name}.yaml"
        listed = yaml.safe_load(file.read_text()) if file.exists() else [{}]
        for number, settings in enumerate(listed):
            if "model" in settings:  # pretrained, large, and BERT once more
                continue
            found.append(pytest.param(name, {"name": name, **settings}, REFUSED.get((name, number)), id=f"{name}-{number}"))
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(("name", "settings", "refusal"), examples())
def test_a_tower_cut_over_two_ranks_is_the_whole_one(
    ranks, tokenizer: str, name: str, settings: dict[str, Any], refusal: str | None
) -> None:
    settings = {key: tokenizer if value == "TOKENIZER" else value for key, value in settings.items()}
    if refusal is not None:
        with pytest.raises(RequestError, match=refusal):
            build(settings).check_tensor_ranks(2)
        return
    assert ranks(2)(compare, settings, name not in DROPOUT_INSIDE)[0] < 1e-12


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    tower = build({"name": "open_clip_image", "architecture": "small-vit"})
    said = "4 heads and 128 hidden units, which 3 tensor ranks do not divide; these do: 1, 2, 4"
    with pytest.raises(RequestError, match=f"its blocks have {said}$"):
        tower.check_tensor_ranks(3)


def draw_inside(mesh: Mesh) -> tuple[list[float], list[float], int]:
    """Random numbers inside two regions one after the other, and after them; and how many tensors the region still holds."""
    torch.manual_seed(5)
    region = Region(mesh.device_mesh({"copies": 1, "parts": 1, "tensor": mesh.world})["tensor"], random=True)
    inside, outside = [], []
    for _ in range(2):
        x = torch.ones(2)
        assert region.enter(x) is region.enter(x), "one sum of gradients for query, key and value"
        inside.append(float(torch.rand(())))
        region.forget()
        outside.append(float(torch.rand(())))
    return inside, outside, sum(isinstance(value, Tensor) for value in vars(region).values())


def test_dropout_inside_is_drawn_by_each_rank_and_outside_by_all_alike(ranks) -> None:
    (first, first_outside, held), (second, second_outside, _) = ranks(2)(draw_inside)
    assert len({*first, *second}) == 4, "each rank its own, each region anew"
    assert first_outside == second_outside
    assert not held
