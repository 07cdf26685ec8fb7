"""Packing: the settings that decide a data set's bytes, and why a row may not become a sample."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from clipscale import __version__
from clipscale.settings import Settings
from data_tools.expressions import Condition
from data_tools.resizing import Resize

LIMITS = frozenset(
    {
        *("image too small", "image too large", "image too elongated", "recording too short", "recording too long"),
        *("caption too short", "caption too long"),
    }
)
"""Reasons for which a row is left out as asked: it is counted and listed, and is no failure."""

TRANSFORMS = 2
"""Version of what is done to images, recordings and captions. It grows with every change that gives other bytes of the same input, so that
a build that was begun by other code is refused and not continued: half its shards would be made in another way."""


def code() -> str:
    """What made a data set, for its fingerprint."""
    return f"clipscale {__version__}, transforms {TRANSFORMS}"


class Packing(Settings):
    """How rows become shards. The same rows with the same packing give the same bytes."""

    samples_per_shard: int = Field(default=2_000, ge=1, le=100_000)
    """Rows a shard is made of; a shard is one process's piece of work and should stay well below 1 GB."""
    where: str | None = None
    """Rows that do not fulfil this condition are not read at all; see expressions.py."""
    clean_captions: bool = False
    """Undo what pages of the web do to captions; see captions.py. Without it only control characters and repeated white space go."""
    min_words: int = Field(default=1, ge=1)
    """Captions of fewer words are dropped, and rows that have no other; words are what white space separates."""
    max_words: int | None = Field(default=None, ge=1)
    """Captions of more words are dropped, and rows that have no other."""
    max_side: int | None = Field(default=None, ge=16, le=16_384)
    """Images whose longer side has more pixels are shrunk to this; the same as `resize` longer:N. None keeps every image as it is."""
    resize: str | None = None
    """How images are resized; see resizing.py."""
    image_format: Literal["keep", "jpg", "png", "webp"] = "keep"
    """What images are stored as. With `keep` an image that is resized stays what it was."""
    quality: int | None = Field(default=None, ge=1, le=100)
    """Of JPEG and WebP; when given, every such image is encoded anew. When not, only those that must be, with quality 95."""
    min_side: int | None = Field(default=None, ge=1)
    """Images whose shorter side has fewer pixels are left out."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Images with more pixels are left out."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Images whose longer side is more than so many times their shorter side are left out."""
    min_seconds: float = Field(default=0.0, ge=0)
    """Shorter recordings are left out."""
    max_seconds: float = Field(default=300.0, gt=0, le=36_000)
    """Longer recordings are left out."""
    check_images: Literal["decode", "header"] = "decode"
    """`decode` finds every image that cannot be read; `header` looks only at its beginning and end, and is several times faster."""

    @field_validator("resize")
    @classmethod
    def _check_resize(cls, value: str | None) -> str | None:
        if value is not None:
            Resize.parse(value)
        return value

    @field_validator("where")
    @classmethod
    def _check_where(cls, value: str | None) -> str | None:
        if value is not None:
            Condition(value)
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.resize is not None and self.max_side is not None:
            raise ValueError("max_side N is resize longer:N; give one of them")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words {self.max_words} is less than min_words {self.min_words}: no caption would be left")
        return self

    @cached_property
    def resizing(self) -> Resize | None:
        """What `resize` or `max_side` asks for."""
        text = self.resize if self.max_side is None else f"longer:{self.max_side}"
        return Resize.parse(text) if text else None


class BadRow(Exception):
    """A row that cannot become a sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """One of a few: what failures are counted by."""
        self.detail = detail
