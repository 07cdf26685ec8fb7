"""What the two open_clip towers share: finding an architecture and its weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config

from clipscale.errors import RequestError
from clipscale.settings import did_you_mean
from clipscale.towers import Tower
from clipscale.towers._module import on_meta_device

LOCAL_FOLDER, HUB = "local-dir:", "hf-hub:"

SMALL_IMAGE = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 16, "image_size": 16}
SMALL_TEXT = {"layers": 1, "width": 8, "heads": 1, "context_length": 8, "vocab_size": 8}
"""Stand-ins for the half of a CLIP model that is not wanted, when no weights have to fit it."""


class OpenClipTower(Tower):
    """What the settings of both halves have."""

    architecture: str
    """open_clip's name, such as ViT-B-16; or `local-dir:FOLDER` or `hf-hub:NAME`, which bring their weights."""
    pretrained: str | None = None
    """A checkpoint of the whole CLIP model (.pt, .safetensors), or a tag of open_clip's; none: random weights."""

    @property
    def tokenizer_folder(self) -> str | None:
        """Where captions are not tokenised by the architecture's own tokenizer: the folder of theirs."""
        return None


def create(architecture: str, pretrained: str | None, *, unwanted: str, **options: Any) -> Any:
    """The whole open_clip model in fp32 on torch's default device; without weights its `unwanted` half is a tiny one.

    On the meta device no weights are read: only names and shapes are wanted there.

    Args:
        unwanted: vision_cfg or text_cfg.

    Raises:
        RequestError: there is no such architecture, tag or file, or the weights do not fit.
    """
    name, pretrained = _check_names(architecture, pretrained)
    has_weights = pretrained is not None or name.startswith((LOCAL_FOLDER, HUB))
    if not has_weights:
        options[unwanted] = SMALL_IMAGE if unwanted == "vision_cfg" else SMALL_TEXT
    try:
        with quiet():
            return open_clip.create_model(
                name,
                pretrained,
                precision="fp32",
                device=torch.get_default_device(),
                force_custom_text=True,
                pretrained_text=False,
                load_weights=not on_meta_device(),
                require_pretrained=has_weights and not on_meta_device(),
                **options,
            )
    except Exception as error:  # open_clip, torch, safetensors and hub clients each raise their own kinds
        weights = f" with weights '{pretrained}'" if pretrained else ""
        raise RequestError(f"open_clip cannot make '{architecture}'{weights}: {' '.join(str(error).split())[:400]}") from error


def configured_width(architecture: str) -> int:
    """Width of both halves' features, by the architecture's configuration."""
    local_or_hub = architecture.startswith((LOCAL_FOLDER, HUB))
    return int(get_model_config(architecture if local_or_hub else architecture.replace("/", "-"))["embed_dim"])


def _check_names(architecture: str, pretrained: str | None) -> tuple[str, str | None]:
    """The names as open_clip wants them."""
    if architecture.startswith((LOCAL_FOLDER, HUB)):
        if pretrained is not None:
            raise RequestError(f"architecture '{architecture}' brings its own weights; leave out pretrained: {pretrained}")
        folder = Path(architecture.removeprefix(LOCAL_FOLDER)).expanduser()
        if architecture.startswith(LOCAL_FOLDER) and not (folder / "open_clip_config.json").is_file():
            raise RequestError(f"'{architecture}': there is no {folder / 'open_clip_config.json'}")
        return (f"{LOCAL_FOLDER}{folder}" if architecture.startswith(LOCAL_FOLDER) else architecture), None
    name, known = architecture.replace("/", "-"), open_clip.list_models()
    if name not in known:
        raise RequestError(
            f"open_clip has no architecture '{architecture}'{did_you_mean(name, known)}; it has {len(known)}, "
            f"such as {', '.join(known[:: max(1, len(known) // 8)][:8])}; or give local-dir:FOLDER or hf-hub:NAME"
        )
    return name, _check_weights(name, pretrained)


def _check_weights(name: str, pretrained: str | None) -> str | None:
    if pretrained is None:
        return None
    path = Path(pretrained).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not path.is_file() and pretrained.lower().replace("-", "_") not in {tag.lower().replace("-", "_") for tag in tags}:
        raise RequestError(f"pretrained '{pretrained}' is neither a file nor a tag of {name}; its tags: {', '.join(tags) or 'none'}")
    return str(path) if path.is_file() else pretrained


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs through the root logger, which installs a handler by itself; weights for another activation are an error."""
    root, disabled, handler = logging.getLogger(), logging.root.manager.disable, logging.NullHandler()
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
