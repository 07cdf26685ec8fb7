"""Resizing: what size a picture becomes, and which part of it is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self, cast

from PIL import Image

Mode = Literal["longer", "shorter", "exact", "crop", "border"]
_FORM = re.compile(r"(longer|shorter|exact|crop|border):(\d+)(?:x(\d+))?")
_LARGEST = 16_384


@dataclass(frozen=True)
class Resize:
    """How pictures are resized.

    - `longer:N`, `shorter:N`: that side becomes N where it has more pixels, and the shape is kept
    - `exact:WxH`: stretched to W×H
    - `crop:WxH`: scaled to cover W×H, and the middle cut out
    - `border:WxH`: scaled to fit into W×H, white (or transparent) around it
    """

    mode: Mode
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`mode:N` or `mode:WxH`; a ValueError when it is something else."""
        found = _FORM.fullmatch(text)
        if not found:
            raise ValueError("write longer:N, shorter:N, exact:WxH, crop:WxH or border:WxH, with N, W and H in pixels")
        mode, width, height = cast(Mode, found[1]), int(found[2]), int(found[3] or found[2])
        if mode in ("longer", "shorter") and found[3]:
            raise ValueError(f"{mode} takes one number of pixels: {mode}:{width}")
        if not (16 <= width <= _LARGEST and 16 <= height <= _LARGEST):
            raise ValueError(f"a side has 16 to {_LARGEST} pixels")
        return cls(mode, width, height)

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that a picture of this size is scaled to, before anything is cut off or put around it."""
        width, height = size
        if self.mode == "exact":
            return self.width, self.height
        if self.mode in ("longer", "shorter"):
            side = max(size) if self.mode == "longer" else min(size)
            factor = min(1.0, self.width / side)
        else:
            factor = (max if self.mode == "crop" else min)(self.width / width, self.height / height)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def changes(self, size: tuple[int, int]) -> bool:
        """Whether a picture of this size becomes another."""
        return self.scaled(size) != size or not self.makes(size)

    def makes(self, size: tuple[int, int]) -> bool:
        """Whether a scaled picture of this size needs nothing cut off and nothing around it."""
        return self.mode not in ("crop", "border") or size == (self.width, self.height)

    def finish(self, picture: Image.Image) -> Image.Image:
        """Cut the middle out of a scaled picture, or put a border around it."""
        if self.makes(picture.size):
            return picture
        left, top = (self.width - picture.width) // 2, (self.height - picture.height) // 2
        if self.mode == "crop":
            return picture.crop((-left, -top, -left + self.width, -top + self.height))
        white = {"L": "#fff", "RGB": "#fff", "RGBA": "#fff0"}[picture.mode]
        canvas = Image.new(picture.mode, (self.width, self.height), white)
        canvas.paste(picture, (left, top))
        return canvas
