"""The text half of any open_clip architecture, with the tokenizer that belongs to it, pretrained or from scratch.

b captions, L = context length, d the architecture's own embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from pydantic import Field
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import TextInput
from clipscale.towers._blocks import largest_block_list, standing_after
from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import configured_width, create, quiet
from clipscale.towers._text_tower import TextTower


class OpenClipText(TextTower):
    """An open_clip text tower with its own final projection."""

    architecture: str
    """open_clip's name, such as ViT-B-16; or `local-dir:FOLDER` or `hf-hub:NAME`, which bring their weights."""
    pretrained: str | None = None
    """A checkpoint of the whole CLIP model (.pt, .safetensors), or a tag of open_clip's; none: random weights."""
    context_length: int | None = Field(default=None, gt=1)
    """Tokens of a caption instead of the architecture's (77); position embeddings are resized. All captions are padded to it."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer instead of the architecture's own; needed offline where that one is not part of open_clip."""

    def build(self) -> TowerModule:
        """Random weights, or those of `pretrained`."""
        model = create(self.architecture, self.pretrained, unwanted="vision_cfg", force_context_length=self.context_length)
        return _OpenClipText(model.text, self._text_input(model.text), configured_width(self.architecture))

    def _text_input(self, text: Any) -> TextInput:
        length = self.context_length or getattr(text, "context_length", None)
        try:
            with quiet():
                if self.tokenizer is not None:
                    tokenizer = HFTokenizer(self.tokenizer, context_length=length or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
                else:
                    tokenizer = open_clip.get_tokenizer(self.architecture, length)
        except Exception as error:  # transformers and its hub client each raise their own kinds
            found = f"the tokenizer '{self.tokenizer}'" if self.tokenizer else f"the tokenizer of '{self.architecture}'"
            raise RequestError(f"{found} cannot be loaded: {' '.join(str(error).split())[:300]}; give tokenizer: FOLDER") from error
        return TextInput(Tokenize(tokenizer), tokenizer.context_length)


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
