"""A small image tower, trained from scratch: a convolutional stem, then as many transformer blocks as wanted.

Convolutions before attention train faster and steadier on little data (Xiao et al. 2021, arXiv:2106.14881).

b samples, n = side² tokens, d width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from clipscale.inputs import ImageInput, Modality
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule
from clipscale.towers._transformer import TransformerBlock


class ConvImage(Tower):
    """Square pictures to features of `width`."""

    modality: ClassVar[Modality] = "image"

    image_size: int = Field(default=32, gt=0)
    """Height and width of a picture, pixels."""
    channels: list[int] = Field(default=[32, 64], min_length=1)
    """Channels of each stem stage; a stage halves height and width, so there remain (image_size / 2^stages)² tokens."""
    width: int = Field(default=128, gt=0)
    layers: int = Field(default=2, ge=0)
    """Transformer blocks after the stem; 0: the stem alone."""
    heads: int = Field(default=4, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of each block's perceptron, as a multiple of `width`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if min(self.channels) < 1:
            raise ValueError(f"channels must be at least 1, found {self.channels}")
        return self

    def build(self) -> TowerModule:
        """Random weights."""
        return _ConvImage(self)


class _ConvImage(TowerModule):
    def __init__(self, settings: ConvImage) -> None:
        super().__init__()
        width = settings.width
        self.embed_dim = width
        self.input = ImageInput(size=settings.image_size)
        channels = [3, *settings.channels]
        stages = [_Stage(*pair) for pair in pairwise(channels)]
        self.stem = nn.ModuleList([*stages, nn.Conv2d(channels[-1], width, kernel_size=1)])
        side = settings.image_size
        for _ in stages:
            side = (side + 1) // 2
        self.positions = nn.Parameter(torch.randn(side * side, width) * 0.02)
        self.dropout = nn.Dropout(settings.dropout)
        self.transformer = nn.ModuleList(
            TransformerBlock(width, heads=settings.heads, mlp_ratio=settings.mlp_ratio, dropout=settings.dropout)
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)

    def blocks(self) -> list[nn.Module]:
        return [*self.stem, *self.transformer]

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return [self.norm]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`pixels` [b, 3, H, W] to features [b, d]."""
        x = inputs["pixels"]
        for stage in self.stem:
            x = stage(x)
        x = self.dropout(x.flatten(2).transpose(1, 2) + self.positions)
        for block in self.transformer:
            x = block(x)
        return self.norm(x).mean(dim=1)  # type: ignore[no-any-return]


class _Stage(nn.Sequential):
    """Halve height and width: [b, c, H, W] -> [b, C, H/2, W/2]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, out_channels),
            nn.GELU(),
        )
