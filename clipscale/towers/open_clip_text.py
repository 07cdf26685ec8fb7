"""The text half of any open_clip architecture, with the tokenizer that belongs to it, pretrained or from scratch."""

from __future__ import annotations

from pydantic import Field

from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import OpenClipTower, configured_width, create
from clipscale.towers._open_clip_modules import text_input, text_module
from clipscale.towers._text_tower import TextTower


class OpenClipText(TextTower, OpenClipTower):
    """An open_clip text tower with its own final projection."""

    context_length: int | None = Field(default=None, gt=1)
    """Tokens of a caption instead of the architecture's (77); position embeddings are resized. All captions are padded to it."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer instead of the architecture's own; needed offline where that one is not part of open_clip."""

    def build(self) -> TowerModule:
        """Random weights, or those of `pretrained`."""
        model = create(self.architecture, self.pretrained, unwanted="vision_cfg", force_context_length=self.context_length)
        fed = text_input(self.architecture, model.text, tokenizer=self.tokenizer, context_length=self.context_length)
        return text_module(model.text, fed, configured_width(self.architecture))

    @property
    def tokenizer_folder(self) -> str | None:
        return self.tokenizer
