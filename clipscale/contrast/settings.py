"""ContrastSettings: how the exact loss is computed; every choice gives the same loss and gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipscale.settings import Settings


class ContrastSettings(Settings):
    """How the loss over the global batch is computed."""

    method: Literal["auto", "dense", "tiled", "grid"] = "auto"
    """`dense`: every rank holds the whole matrix of logits (the reference); `tiled`: one device, tile by tile; `grid`: ranks as
    rows × columns, each logit computed once in the world, tile by tile; `auto`: tiled on one rank, else grid."""
    grid_rows: int | None = Field(default=None, ge=1)
    """Rows of the grid of ranks, a divisor of their number; none: as square as can be."""
    tile_rows: int = Field(default=1024, ge=1)
    """First-modality samples in a tile; a tile of logits takes tile_rows × tile_columns × 4 bytes, a few times over."""
    tile_columns: int = Field(default=1024, ge=1)
    """Second-modality samples in a tile."""
