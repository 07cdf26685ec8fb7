"""Whole models that open_clip wrote: its training checkpoints (.pt), bare weights (.safetensors) and folders with a configuration."""

from __future__ import annotations

import math
import re
from pathlib import Path

import open_clip

from clipscale.errors import RequestError
from clipscale.settings import did_you_mean
from clipscale.towers._both_towers import BothTowers
from clipscale.towers._open_clip import LOCAL_FOLDER, configured_width, create
from clipscale.towers._open_clip_modules import image_module, text_input, text_module

CONFIGURATION = "open_clip_config.json"
_PARAMETERS = "params.txt"


def open_clip_towers(place: Path, *, architecture: str | None = None) -> BothTowers:
    """The towers of a folder with an open_clip_config.json, or of a file of weights.

    Args:
        architecture: open_clip's name for what a file holds; None: what the training that wrote it noted beside it (`params.txt`).

    Raises:
        RequestError: the architecture is not known, or the weights are missing, damaged or another architecture's.
    """
    if place.is_dir():
        name, pretrained = f"{LOCAL_FOLDER}{place}", None
    else:
        name, pretrained = architecture or _noted_architecture(place), str(place)
    model = create(name, pretrained, unwanted="text_cfg")
    width = configured_width(name)
    bias = getattr(model, "logit_bias", None)
    return BothTowers(
        modules={"image": image_module(model, width), "text": text_module(model.text, text_input(name, model.text), width)},
        embed_dim=width,
        scale=math.exp(model.logit_scale.item()),
        bias=None if bias is None else bias.item(),
    )


def _noted_architecture(file: Path) -> str:
    """The architecture that open_clip's training noted in `params.txt`, beside the weights or one folder up."""
    known = open_clip.list_models()
    for folder in (file.parent, file.parent.parent):
        if (folder / _PARAMETERS).is_file():
            found = re.search(r"^model: (.+)$", (folder / _PARAMETERS).read_text(encoding="utf-8"), flags=re.MULTILINE)
            if found:
                return found.group(1).strip()
    raise RequestError(
        f"{file} holds weights, but nothing beside it tells their architecture ({_PARAMETERS} of open_clip's training, or "
        f"{CONFIGURATION}); give --architecture NAME, one of open_clip's {len(known)}, such as ViT-B-32{did_you_mean(file.stem, known)}"
    )
