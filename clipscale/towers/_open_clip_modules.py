"""The modules that the two open_clip towers make of an open_clip model, and what they want to be fed.

b samples, L = context length, d the architecture's own embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, TextInput
from clipscale.towers._blocks import flatten_stages, largest_block_list, standing_after
from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import quiet


def image_module(model: Any, embed_dim: int) -> TowerModule:
    """The image half of an open_clip model, whose features have width `embed_dim`."""
    return _OpenClipImage(model, embed_dim)


class _OpenClipImage(TowerModule):
    def __init__(self, model: Any, embed_dim: int) -> None:
        super().__init__()
        self.visual = model.visual
        if hasattr(self.visual, "output_tokens"):
            self.visual.output_tokens = False
        self.input = _image_input(open_clip.get_model_preprocess_cfg(model))
        self.embed_dim = embed_dim

    def blocks(self) -> list[nn.Module]:
        visual = self.visual
        if isinstance(visual, TimmModel):
            return (
                flatten_stages(visual.trunk.get_submodule(path)) if (path := _timm_blocks(visual.trunk)) else _resnet_blocks(visual.trunk)
            )
        return list(visual.transformer.resblocks) if hasattr(visual, "transformer") else _resnet_blocks(visual)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        visual = self.visual
        if isinstance(visual, TimmModel):
            return [*standing_after(visual.trunk, _timm_blocks(visual.trunk) or "layer4"), visual.head]
        named = [getattr(visual, name, None) for name in ("attnpool", "attn_pool", "attn_pool_contrastive", "ln_post", "proj")]
        return [part for part in named if isinstance(part, (nn.Module, nn.Parameter))]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`pixels` [b, 3, H, W] to features [b, d]."""
        return self.visual(inputs["pixels"])  # type: ignore[no-any-return]


def _timm_blocks(trunk: nn.Module) -> str:
    """Name of a timm model's blocks (ViTs) or stages (ConvNeXt, Swin); '' for ResNets."""
    names = [name for name in ("blocks", "stages", "layers") if hasattr(trunk, name)]
    return names[0] if names else ""


def _resnet_blocks(visual: nn.Module) -> list[nn.Module]:
    return [block for number in range(1, 5) for block in visual.get_submodule(f"layer{number}").children()]


def _image_input(preprocess: dict[str, Any]) -> ImageInput:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise RequestError(f"this architecture wants images of {height} × {width}; only square ones are read: set image_size")
    fits = {"shortest": "crop", "squash": "squash", "longest": "pad"}
    interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
    return ImageInput(height, tuple(preprocess["mean"]), tuple(preprocess["std"]), interpolation, fits[preprocess["resize_mode"]])  # type: ignore[arg-type]


def text_module(text: Any, text_input: TextInput, embed_dim: int) -> TowerModule:
    """The text half of an open_clip model, whose features have width `embed_dim`."""
    return _OpenClipText(text, text_input, embed_dim)


def text_input(architecture: str, text: Any, *, tokenizer: str | None = None, context_length: int | None = None) -> TextInput:
    """What the text half `text` of an architecture wants: its own tokenizer, or that of a folder.

    Raises:
        RequestError: the tokenizer cannot be loaded.
    """
    length = context_length or getattr(text, "context_length", None)
    try:
        with quiet():
            if tokenizer is not None:
                loaded = HFTokenizer(tokenizer, context_length=length or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
            else:
                loaded = open_clip.get_tokenizer(architecture, length)
    except Exception as error:  # transformers and its hub client each raise their own kinds
        found = f"the tokenizer '{tokenizer}'" if tokenizer else f"the tokenizer of '{architecture}'"
        raise RequestError(f"{found} cannot be loaded: {' '.join(str(error).split())[:300]}; give tokenizer: FOLDER") from error
    return TextInput(Tokenize(loaded), loaded.context_length)


@dataclass(frozen=True)
class Tokenize:
    """Captions to `tokens` [b, L] of a fixed length; the mask is all ones, for open_clip's towers find the end by themselves."""

    tokenizer: Any

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(captions)
        return {"tokens": tokens, "mask": torch.ones_like(tokens)}


class _OpenClipText(TowerModule):
    def __init__(self, text: Any, text_input: TextInput, embed_dim: int) -> None:
        super().__init__()
        self.text = text
        self.text.output_tokens = False
        self.input = text_input
        self.embed_dim = embed_dim

    def blocks(self) -> list[nn.Module]:
        if isinstance(self.text, HFTextEncoder):
            return list(self.text.transformer.get_submodule(largest_block_list(self.text.transformer)))
        return list(self.text.transformer.resblocks)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        if isinstance(self.text, HFTextEncoder):
            return [*standing_after(self.text.transformer, largest_block_list(self.text.transformer)), self.text.pooler, self.text.proj]
        named = [self.text.ln_final, self.text.text_projection]
        return [part for part in named if part is not None]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`tokens` [b, L] to features [b, d]."""
        return self.text(inputs["tokens"])  # type: ignore[no-any-return]
