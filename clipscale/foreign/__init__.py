"""Foreign checkpoints: models that open_clip or transformers wrote, opened as encoders that can be evaluated.

Preparation of pictures and recordings, tokenisation, temperature and bias come from the checkpoint's own files. A model that
fails the self-test (clipscale/foreign/self_test.py) is refused: its figures would be those of a loading mistake.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from clipscale.errors import RequestError
from clipscale.foreign.self_test import check_model
from clipscale.model import Encoders, PairKindModel
from clipscale.towers._both_towers import BothTowers

Format = Literal["open_clip", "hugging_face"]
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
_LOCAL_FOLDER = "local-dir:"


@dataclass(frozen=True)
class ForeignModel:
    """A model of somebody else's, loaded and checked."""

    model: Encoders
    provenance: dict[str, Any]
    """Where it lies, its format, and the hash of its weights."""


def foreign_format(address: str | Path) -> Format | None:
    """Which library's checkpoint lies there; None: neither's."""
    place = _place(address)
    if place.is_file() and place.suffix in _WEIGHTS:
        return "open_clip"
    if (place / "open_clip_config.json").is_file():
        return "open_clip"
    if (place / "config.json").is_file():
        return "hugging_face"
    return None


def open_foreign(address: str | Path, *, architecture: str | None = None) -> ForeignModel:
    """Load a checkpoint of open_clip's or a folder of transformers', and test it.

    Args:
        architecture: open_clip's name, for a file of weights that does not tell it.

    Raises:
        RequestError: it cannot be read, lacks weights, or fails the self-test.
    """
    place, kind = _place(address), foreign_format(address)
    if kind is None:
        raise RequestError(f"{address} is no checkpoint of open_clip's (.pt, .safetensors, open_clip_config.json) or of transformers'")
    if architecture is not None and (kind == "hugging_face" or place.is_dir()):
        raise RequestError(f"{address} tells its architecture itself; leave out --architecture {architecture}")
    if kind == "open_clip":
        from clipscale.towers._foreign_open_clip import open_clip_towers

        towers = open_clip_towers(place, architecture=architecture)
    else:
        from clipscale.towers._foreign_hugging_face import hugging_face_towers

        towers = hugging_face_towers(place)
    model = _encoders(towers)
    check_model(model, name=str(address))
    return ForeignModel(model, {"checkpoint": str(address), "format": kind, "checkpoint_sha256": _sha256(place)})


def _place(address: str | Path) -> Path:
    return Path(str(address).removeprefix(_LOCAL_FOLDER)).expanduser()


def _encoders(towers: BothTowers) -> Encoders:
    """The towers with projections that change nothing."""
    medium, text = towers.modules
    kind = PairKindModel((medium, text), init_scale=towers.scale, max_scale=math.inf, init_bias=towers.bias)
    model = Encoders(towers.modules, embed_dim=towers.embed_dim, pair_kinds={f"{medium}_{text}": kind}, seed=0)
    for modality in model.modalities:
        with torch.no_grad():
            model.projections[modality].weight.copy_(torch.eye(towers.embed_dim))  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def _sha256(place: Path) -> str:
    """Of a file; of a folder, of all files in it with their names."""
    if place.is_file():
        return _file_sha256(place)
    lines = [f"{path.name} {_file_sha256(path)}" for path in sorted(place.iterdir()) if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
