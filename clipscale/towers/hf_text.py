"""Any text encoder of transformers: BERT and its kin, CLIP's, T5's, decoders; pretrained or from a configuration.

b captions, L tokens, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import TextInput
from clipscale.towers._blocks import largest_block_list, standing_after
from clipscale.towers._hugging_face import load_model, load_tokenizer, random_model
from clipscale.towers._module import TowerModule
from clipscale.towers._text_tower import TextTower
from clipscale.towers._transformer import masked_mean


class HfText(TextTower):
    """A transformers text encoder, pooled to one vector."""

    model: str | None = None
    """Pretrained weights: a local folder, a hub name, or `package:NAME`, an installed Python package that holds such a folder."""
    config: dict[str, Any] | str | None = None
    """Instead of `model`, random weights: a transformers configuration as a mapping with `model_type`, or a folder or JSON file."""
    tokenizer: str | None = None
    """Folder, hub name or `package:NAME` of the tokenizer; default: the model's own."""
    pooling: Literal["mean", "cls", "eos"] = "mean"
    """Mean of all tokens, the first token, or the last one that is not padding."""
    context_length: int = Field(default=64, gt=1)
    """Longer captions are cut, tokens."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either `model` (pretrained) or `config` (random weights)")
        if self.model is None and self.tokenizer is None:
            raise ValueError("`config` brings no tokenizer: give `tokenizer`, a folder that holds tokenizer.json")
        return self

    def build(self) -> TowerModule:
        """The encoder with its tokenizer."""
        model = load_model(self.model) if self.model is not None else random_model(self.config or {})
        tokenizer = load_tokenizer(self.tokenizer or self.model or "")
        encoder = _text_encoder(model)
        self._check_fit(encoder.config, tokenizer)
        return _HfText(encoder, TextInput(Tokenize(tokenizer, self.context_length), self.context_length), self.pooling)

    def _check_fit(self, config: Any, tokenizer: Any) -> None:
        limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        limit = min(size for size in limits if size is not None and size > 0)
        if self.context_length > limit:
            raise RequestError(f"context_length {self.context_length} is more than the text encoder's {limit}")
        if len(tokenizer) > config.vocab_size:
            raise RequestError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder's vocabulary only {config.vocab_size}")


@dataclass(frozen=True)
class Tokenize:
    """Captions to `tokens` and `mask` [b, L], padded on the right to the longest."""

    tokenizer: Any
    context_length: int

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(captions, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt")
        mask = encoded["attention_mask"]
        mask[:, 0] = 1  # some tokenizers make no token of an empty caption; attention needs one
        return {"tokens": encoded["input_ids"], "mask": mask}


def _text_encoder(model: Any) -> Any:
    """The text encoder alone, without the heads that pooling here makes idle: DDP waits for the gradient of every parameter."""
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = getattr(model, "text_model", model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if isinstance(getattr(model, "head", None), nn.Module):
        model.head = nn.Identity()
    return model


class _HfText(TowerModule):
    def __init__(self, encoder: Any, text_input: TextInput, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.config.use_cache = False  # decoders would keep keys and values, and see them twice when recomputed
        self.embed_dim = encoder.config.hidden_size
        self.input = text_input
        self.pooling = pooling

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.get_submodule(largest_block_list(self.encoder)))

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return standing_after(self.encoder, largest_block_list(self.encoder))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`tokens` and `mask` [b, L] to features [b, d]."""
        mask = inputs["mask"]
        hidden: Tensor = self.encoder(input_ids=inputs["tokens"], attention_mask=mask).last_hidden_state
        if self.pooling == "mean":
            return masked_mean(hidden, mask.bool())
        if self.pooling == "cls":
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
