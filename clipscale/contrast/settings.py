"""ContrastSettings: how the exact loss is computed; every choice but those of rounding gives the same loss and gradients."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipscale.settings import Settings

WireDtype = Literal["bfloat16", "float16"]
MIB = 2**20


class ContrastSettings(Settings):
    """How the loss over the global batch is computed."""

    method: Literal["auto", "dense", "tiled", "grid"] = "auto"
    """`dense`: every rank holds the whole matrix of logits (the reference); `tiled`: one device, tile by tile; `grid`: ranks as
    rows × columns, each logit computed once in the world, tile by tile; `auto`: tiled on one rank, else grid."""
    grid_rows: int | None = Field(default=None, ge=1)
    """Rows of the grid of ranks, a divisor of their number; none: as square as can be."""
    tile_rows: int | None = Field(default=None, ge=1)
    """Pairs along the rows of a tile of logits; none: what suits device and backend. A tile takes rows × columns × 4 bytes, a few
    times over."""
    tile_columns: int | None = Field(default=None, ge=1)
    """Pairs along the columns of a tile; none: what suits device and backend."""
    cache_bytes: int | None = Field(default=None, ge=0)
    """How much of the logits the first sweep may keep for the gradient's, which then computes three matrix products instead of four;
    none: all of them where they fit 64 MiB, else nothing; the `triton` backend keeps none."""
    backend: Literal["auto", "torch", "compile", "triton"] = "auto"
    """What computes a tile: `torch`, the objective's terms as they stand; `compile`, the terms by torch.compile, which fuses them and takes
    a while at the first call; `triton`, fused kernels for float32 and bfloat16 features on CUDA (compute capability 8.0 and above) and
    objectives of the softmax and sigmoid families: clip, dcl, dclw, siglip and others with such terms; no logit is ever in memory.
    `auto`: on the CPU torch; on CUDA triton for bfloat16 features where the kernels know the objective, else compile."""
    feature_dtype: Literal["bfloat16"] | None = None
    """What embeddings are rounded to before the loss, as most trainers do with the towers' precision; statistics, loss and gradients stay
    float32. On CUDA it is what lets the fused kernels in, several times faster than float32 products. None: not at all."""
    feature_wire: WireDtype | None = None
    """What embeddings are rounded to when they are sent to other ranks, which halves their bytes; none: not at all."""
    gradient_wire: Literal["bfloat16"] | None = None
    """What each rank's part of an embedding's gradient is rounded to when it is sent to its owner; none: not at all. float16
    would lose them: gradients of a large batch lie below its smallest numbers."""

    def cache_for(self, logits_bytes: int) -> int:
        """Bytes of logits to keep, of a block that has so many."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        return logits_bytes if logits_bytes <= 64 * MIB else 0


def named_dtype(name: WireDtype | None) -> torch.dtype | None:
    """The dtype of this name."""
    return None if name is None else {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]
