"""To open_clip: two of its towers with their projections as one folder that open_clip loads (`local-dir:FOLDER`).

A projection of ours is a matrix behind the tower's own last matrix; their product takes the place of the latter, so the
exported model has no parameter that open_clip does not know.

D width of the shared space, d the tower's own width, w what stands before the tower's own projection.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_clip.factory import get_model_config
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, TextInput
from clipscale.settings import part_name
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import HUB, LOCAL_FOLDER, OpenClipTower

CONFIGURATION, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_RESIZE_MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}


@dataclass(frozen=True)
class Trained:
    """What is exported: two towers of a model, and what its pair kind adds."""

    image: Tower
    text: Tower
    modules: Mapping[str, TowerModule]
    """By modality."""
    projections: Mapping[str, Tensor]
    """[D, d] by modality."""
    scale: float
    bias: float | None


def check_open_clip(image: Tower, text: Tower) -> tuple[OpenClipTower, OpenClipTower]:
    """The towers, known to be open_clip's.

    Raises:
        RequestError: open_clip has no such tower.
    """
    for tower in (image, text):
        if not isinstance(tower, OpenClipTower):
            raise RequestError(f"the {tower.modality} tower {part_name(type(tower))} is not one of open_clip's; others cannot be exported")
    assert isinstance(image, OpenClipTower)
    assert isinstance(text, OpenClipTower)
    return image, text


def write_open_clip(trained: Trained, folder: Path) -> None:
    """Write configuration, weights and, where open_clip does not carry it, the tokenizer.

    Raises:
        RequestError: a tower is not open_clip's, or the two do not fit into one of its models.
    """
    image, text = check_open_clip(trained.image, trained.text)
    config = _model_config(image, text, trained)
    weights = _weights(trained, config)
    tokenizer = trained.modules["text"].input.tokenize.tokenizer  # type: ignore[union-attr]
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.tokenizer.save_pretrained(folder)
    elif not isinstance(tokenizer, SimpleTokenizer):
        raise RequestError(f"the tokenizer {type(tokenizer).__name__} cannot be written; set the text tower's `tokenizer` to a folder")
    picture = trained.modules["image"].input
    assert isinstance(picture, ImageInput)
    preprocess = {key: value for key, value in asdict(picture).items() if key != "fit"}
    described = {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": _RESIZE_MODES[picture.fit]}}
    (folder / CONFIGURATION).write_text(json.dumps(described, indent=2) + "\n")
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, folder / WEIGHTS)


def model_config(architecture: str) -> dict[str, Any]:
    """A copy of an architecture's configuration."""
    with_place = architecture.startswith((LOCAL_FOLDER, HUB))
    return copy.deepcopy(get_model_config(architecture if with_place else architecture.replace("/", "-")))


def _model_config(image: OpenClipTower, text: OpenClipTower, trained: Trained) -> dict[str, Any]:
    first, second = model_config(image.architecture), model_config(text.architecture)
    gelus = [bool(config.get("quick_gelu")) for config in (first, second)]
    if gelus[0] != gelus[1] and "timm_model_name" not in first["vision_cfg"]:
        raise RequestError(f"of {image.architecture} and {text.architecture} one uses QuickGELU; open_clip has one setting for both")
    words = trained.modules["text"].input
    picture = trained.modules["image"].input
    assert isinstance(words, TextInput)
    assert isinstance(picture, ImageInput)
    text_config = {**second["text_cfg"], "context_length": words.context_length}
    if text.tokenizer_folder is not None:
        text_config = {key: value for key, value in text_config.items() if key not in ("tokenizer_kwargs", "tokenizer_mode")}
        text_config["hf_tokenizer_name"] = Path(text.tokenizer_folder).name  # of a local folder open_clip takes the files in it
    config: dict[str, Any] = {
        "embed_dim": len(trained.projections["image"]),
        "vision_cfg": {**first["vision_cfg"], "image_size": picture.size, "timm_model_pretrained": False},
        "text_cfg": {**text_config, **({"hf_model_pretrained": False} if "hf_model_name" in text_config else {})},
        "custom_text": True,
    }
    if not first["vision_cfg"].get("timm_model_name"):
        del config["vision_cfg"]["timm_model_pretrained"]
    if gelus[1]:
        config["quick_gelu"] = True
    if trained.bias is not None:
        config["init_logit_bias"] = trained.bias
    return config


def _weights(trained: Trained, config: dict[str, Any]) -> dict[str, Tensor]:
    visual = dict(trained.modules["image"].state_dict())
    text = dict(trained.modules["text"].state_dict())
    _fold_image(visual, trained.projections["image"], config["vision_cfg"])
    _fold_text(text, trained.projections["text"], config["text_cfg"])
    weights = {**visual, **text, "logit_scale": trained.projections["image"].new_tensor(math.log(trained.scale))}
    if trained.bias is not None:
        weights["logit_bias"] = trained.projections["image"].new_tensor(trained.bias)
    return weights


def _fold_image(weights: dict[str, Tensor], projection: Tensor, config: dict[str, Any]) -> None:
    """Multiply a projection into the image tower's own, in place; a tower that has none gets one."""
    if "visual.proj" in weights:  # [w, d]
        weights["visual.proj"] = weights["visual.proj"] @ projection.T
    elif (name := _last_linear(weights, "visual.attnpool.c_proj", "visual.head.proj", "visual.head.mlp.fc2")) is not None:
        _fold_linear(weights, name, projection)
    elif config.get("timm_proj") == "none" or config.get("timm_pool") not in (None, "abs_attn", "rot_attn"):
        _refuse_classifier(weights)
        config["timm_proj"], config["timm_proj_bias"] = "linear", False
        if config["timm_pool"] == "map":
            config["timm_pool"] = ""  # the model's own, which is `map` for SigLIP's; timm cannot add one before a projection
        weights["visual.head.proj.weight"] = projection
    else:
        raise RequestError(f"the image tower ends in {config.get('timm_pool')}, which a projection cannot be multiplied into")


def _refuse_classifier(weights: dict[str, Tensor]) -> None:
    """A timm model whose own classifier is its projection would lose it."""
    named = [name for name in weights if name.startswith(("visual.trunk.head.fc.", "visual.trunk.fc.", "visual.trunk.classifier."))]
    if named or "visual.trunk.head.weight" in weights:
        raise RequestError("the image tower's projection is timm's own classifier, which open_clip has no other place for")


def _fold_text(weights: dict[str, Tensor], projection: Tensor, config: dict[str, Any]) -> None:
    """The same for the text tower."""
    if "text.text_projection" in weights:  # [w, d]
        weights["text.text_projection"] = weights["text.text_projection"] @ projection.T
    elif (name := _last_linear(weights, "text.text_projection", "text.proj.2", "text.proj")) is not None:
        _fold_linear(weights, name, projection)
    elif "hf_model_name" in config:
        config["hf_proj_type"] = "linear"
        weights["text.proj.weight"] = projection
    else:
        config["proj_type"] = "linear"
        weights["text.text_projection"] = projection.T


def _last_linear(weights: Mapping[str, Tensor], *names: str) -> str | None:
    return next((name for name in names if f"{name}.weight" in weights), None)


def _fold_linear(weights: dict[str, Tensor], name: str, projection: Tensor) -> None:
    for part in ("weight", "bias"):  # [d, w], [d]
        if f"{name}.{part}" in weights:
            weights[f"{name}.{part}"] = projection @ weights[f"{name}.{part}"]
