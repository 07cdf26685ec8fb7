"""A transformer over log-mel frames, trained from scratch: strided convolutions, then pre-norm blocks, then the mean.

The shape of Whisper's encoder (Radford et al. 2022, arXiv:2212.04356) at any size, for recordings of any length: padding
is masked in the convolutions, in attention and in the mean.

b samples, M mel bins, F frames, n tokens, d width.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from clipscale.inputs import Modality, SpeechInput
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule
from clipscale.towers._transformer import TransformerBlock, masked_mean, sinusoids, valid_positions


class LogMelTransformer(Tower):
    """Log-mel frames to features of `width`."""

    modality: ClassVar[Modality] = "speech"

    num_mels: int = Field(default=80, gt=0)
    """Mel bins of a frame; a frame is taken every 10 ms."""
    width: int = Field(default=256, gt=0, multiple_of=2)
    layers: int = Field(default=6, gt=0)
    heads: int = Field(default=4, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of each block's perceptron, as a multiple of `width`."""
    stem: list[int] = Field(default=[2, 2], min_length=1)
    """Stride of each convolution before the blocks; [2, 2] makes a token of 40 ms."""
    max_seconds: float = Field(default=10.0, gt=0)
    """Longer recordings are cut."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if min(self.stem) < 1:
            raise ValueError(f"stem strides must be at least 1, found {self.stem}")
        return self

    def build(self) -> TowerModule:
        """Random weights."""
        return _LogMelTransformer(self)


class _LogMelTransformer(TowerModule):
    def __init__(self, settings: LogMelTransformer) -> None:
        super().__init__()
        width = settings.width
        self.embed_dim = width
        self.input = SpeechInput(max_seconds=settings.max_seconds, features="log_mel", num_mels=settings.num_mels)
        channels = [settings.num_mels] + [width] * len(settings.stem)
        self.stem = nn.ModuleList(
            nn.Conv1d(channels[i], width, kernel_size=3, stride=stride, padding=1) for i, stride in enumerate(settings.stem)
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.transformer = nn.ModuleList(
            TransformerBlock(width, heads=settings.heads, mlp_ratio=settings.mlp_ratio, dropout=settings.dropout)
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return [self.norm]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`mel` [b, M, F] and `length` [b] in frames to features [b, d]."""
        x, valid = self._embed(inputs["mel"], inputs["length"])
        x = self.dropout(x + sinusoids(x.shape[1], x.shape[2], device=x.device).to(x.dtype))
        for block in self.transformer:
            x = block(x, valid)
        return masked_mean(self.norm(x), valid)

    def _embed(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Frames to tokens [b, n, d] and their mask [b, n]; each convolution sees zeros where a row has ended."""
        valid = valid_positions(length, x.shape[2])
        for convolution in self.stem:
            assert isinstance(convolution, nn.Conv1d)
            x = functional.gelu(convolution(x.masked_fill(~valid.unsqueeze(1), 0.0)))
            length = (length - 1) // convolution.stride[0] + 1
            valid = valid_positions(length, x.shape[2])
        return x.transpose(1, 2), valid
