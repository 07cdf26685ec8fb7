"""open_clip towers give what open_clip gives, from every form its weights come in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small_models import write_tokenizer
from torch.testing import assert_close

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, TextInput
from clipscale.model import build_encoders
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

ARCHITECTURE = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
CAPTIONS = ["a photo of a cat", "two dogs"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A CLIP model made by open_clip, under an architecture name that open_clip knows."""
    for name, config in (("small-clip", ARCHITECTURE), ("small-clip-custom", {**ARCHITECTURE, "custom_text": True})):
        file = tmp_path_factory.mktemp("architectures") / f"{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
    torch.manual_seed(0)
    return open_clip.create_model("small-clip").eval()


def as_pt(model: Any, folder: Path) -> dict[str, str]:
    torch.save({"epoch": 3, "name": "run", "state_dict": model.state_dict(), "optimizer": {}}, folder / "epoch_3.pt")
    return {"architecture": "small-clip", "pretrained": str(folder / "epoch_3.pt")}


def as_ddp_pt(model: Any, folder: Path) -> dict[str, str]:
    weights = {f"module.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, folder / "epoch_3.pt")
    return {"architecture": "small-clip", "pretrained": str(folder / "epoch_3.pt")}


def as_bare_pt(model: Any, folder: Path) -> dict[str, str]:
    torch.save(model.state_dict(), folder / "weights.pt")
    return {"architecture": "small-clip", "pretrained": str(folder / "weights.pt")}


def as_safetensors(model: Any, folder: Path) -> dict[str, str]:
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "weights.safetensors")
    return {"architecture": "small-clip", "pretrained": str(folder / "weights.safetensors")}


def as_local_folder(model: Any, folder: Path) -> dict[str, str]:
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": PREPROCESS}))
    return {"architecture": f"local-dir:{folder}"}


FORMS = [as_pt, as_ddp_pt, as_bare_pt, as_safetensors, as_local_folder]
Form = Callable[[Any, Path], dict[str, str]]


def build(part: str, settings: dict[str, Any]) -> TowerModule:
    return Tower.model_validate({"name": part, **settings}).build().eval()


@pytest.mark.parametrize("form", FORMS)
def test_features_equal_those_of_open_clip_for_every_form_of_weights(original: Any, tmp_path: Path, form: Form) -> None:
    settings = form(original, tmp_path)
    image, text = build("open_clip_image", settings), build("open_clip_text", settings)
    pixels = torch.randn(2, 3, 32, 32)
    assert isinstance(text.input, TextInput)
    inputs = text.input.tokenize(CAPTIONS)
    assert torch.equal(inputs["tokens"], open_clip.get_tokenizer("small-clip")(CAPTIONS))
    assert_close(image({"pixels": pixels}), original.encode_image(pixels))
    assert_close(text(inputs), original.encode_text(inputs["tokens"]))
    assert image.embed_dim == text.embed_dim == 12


def test_a_model_whose_text_half_is_a_module_of_its_own_loads_too(original: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    custom = open_clip.create_model("small-clip-custom").eval()
    torch.save({"state_dict": custom.state_dict()}, tmp_path / "custom.pt")
    text = build("open_clip_text", {"architecture": "small-clip", "pretrained": str(tmp_path / "custom.pt")})
    tokens = open_clip.get_tokenizer("small-clip")(CAPTIONS)
    assert_close(text({"tokens": tokens}), custom.encode_text(tokens))
    assert not torch.equal(text({"tokens": tokens}), original.encode_text(tokens))


def test_pictures_are_prepared_as_the_folder_says(original: Any, tmp_path: Path) -> None:
    settings = as_local_folder(original, tmp_path)
    assert build("open_clip_image", settings).input == ImageInput(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", "squash")


def test_another_image_size_keeps_the_weights(original: Any, tmp_path: Path) -> None:
    tower = build("open_clip_image", {**as_pt(original, tmp_path), "image_size": 48})
    assert isinstance(tower.input, ImageInput)
    assert tower.input.size == 48
    assert torch.equal(tower.state_dict()["visual.conv1.weight"], original.visual.conv1.weight)
    assert tower({"pixels": torch.randn(1, 3, 48, 48)}).shape == (1, 12)


@pytest.mark.parametrize("patch_dropout", [None, 0.5])
def test_patches_are_dropped_in_training_when_asked(original: Any, patch_dropout: float | None) -> None:
    del original  # only registers the architecture
    tower = build("open_clip_image", {"architecture": "small-clip", "patch_dropout": patch_dropout}).train()
    inputs = {"pixels": torch.randn(1, 3, 32, 32)}
    assert torch.equal(tower(inputs), tower(inputs)) is (patch_dropout is None)


def test_without_weights_the_seed_decides(original: Any) -> None:
    del original  # only registers the architecture
    tower = Tower.model_validate({"name": "open_clip_image", "architecture": "small-clip"})
    first, again, other = (build_encoders({"image": tower}, embed_dim=4, pair_kinds={}, seed=seed).state_dict() for seed in (0, 0, 1))
    name = "towers.image.visual.conv1.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_an_unknown_architecture_is_answered_with_its_neighbour() -> None:
    with pytest.raises(RequestError, match="open_clip has no architecture 'ViT-B/31', did you mean 'ViT-B-32'"):
        build("open_clip_image", {"architecture": "ViT-B/31"})


def test_an_unknown_tag_is_answered_with_the_tags_there_are() -> None:
    with pytest.raises(RequestError, match="neither a file nor a tag of ViT-B-32; its tags: openai, laion400m_e31"):
        build("open_clip_text", {"architecture": "ViT-B-32", "pretrained": "laion3b"})


@pytest.mark.parametrize("quick", [True, False])
def test_a_tag_loads_unless_its_weights_were_trained_with_the_other_activation(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    file = as_pt(original, tmp_path)["pretrained"]
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "small-clip", {"ours": {"file": file, "quick_gelu": quick, "mean": (0.1, 0.2, 0.3)}}
    )
    settings = {"architecture": "small-clip", "pretrained": "ours"}
    if quick:  # as the architecture
        assert build("open_clip_image", settings).input == ImageInput(32, (0.1, 0.2, 0.3))
    else:
        with pytest.raises(RequestError, match="QuickGELU mismatch"):
            build("open_clip_image", settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, _: path.write_bytes(b"PK\x03\x04 not a checkpoint"), "open_clip cannot make 'small-clip' with weights"),
        (lambda path, model: torch.save({"state_dict": {"visual.proj": model.visual.proj}}, path), "Missing key"),
        (lambda path, _: torch.save({"state_dict": open_clip.create_model("small-clip", embed_dim=8).state_dict()}, path), "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(original: Any, tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "weights.pt"
    spoil(path, original)
    with pytest.raises(RequestError, match=message):
        build("open_clip_image", {"architecture": "small-clip", "pretrained": str(path)})


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no .*open_clip_config.json"):
        build("open_clip_image", {"architecture": f"local-dir:{tmp_path}"})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    with pytest.raises(RequestError, match="pretrained weights"):
        build("open_clip_image", {"architecture": f"local-dir:{tmp_path}"})
    with pytest.raises(RequestError, match="brings its own weights"):
        build("open_clip_image", {"architecture": f"local-dir:{tmp_path}", "pretrained": "openai"})


def test_oblong_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "oblong.json").write_text(
        json.dumps({**ARCHITECTURE, "vision_cfg": {**ARCHITECTURE["vision_cfg"], "image_size": [32, 64]}})
    )  # type: ignore[dict-item]
    open_clip.add_model_config(tmp_path / "oblong.json")
    with pytest.raises(RequestError, match="32 × 64; only square ones"):
        build("open_clip_image", {"architecture": "oblong"})


def test_a_tokenizer_that_is_not_at_hand_is_named_and_a_folder_serves_instead(tmp_path: Path) -> None:
    text_config = {**ARCHITECTURE["text_cfg"], "hf_tokenizer_name": "nobody/nothing", "context_length": 8}  # type: ignore[dict-item]
    (tmp_path / "foreign-tokens.json").write_text(json.dumps({**ARCHITECTURE, "text_cfg": text_config}))
    open_clip.add_model_config(tmp_path / "foreign-tokens.json")
    with pytest.raises(RequestError, match=r"the tokenizer of 'foreign-tokens' cannot be loaded.*give tokenizer: FOLDER"):
        build("open_clip_text", {"architecture": "foreign-tokens"})
    folder = write_tokenizer(tmp_path / "tokenizer")
    tower = build("open_clip_text", {"architecture": "foreign-tokens", "tokenizer": str(folder)})
    assert isinstance(tower.input, TextInput)
    assert tower.input.tokenize(["a cat"])["tokens"].tolist() == [[2, 4, 5, 3, 0, 0, 0, 0]]


def test_building_prints_nothing_and_leaves_the_log_alone(
    original: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own; pytest has installed handlers here
    build("open_clip_image", {"architecture": "small-clip"})
    build("open_clip_text", as_pt(original, tmp_path))
    assert logging.getLogger().handlers == []
    logging.getLogger().addHandler(logging.StreamHandler())  # a program that logs hears nothing of open_clip's building either
    build("open_clip_image", {"architecture": "small-clip"})
    assert logging.root.manager.disable == logging.NOTSET
    assert capfd.readouterr() == ("", "")
