"""Packing: the settings that decide a data set's bytes, and why a row may not become a sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipscale.settings import Settings


class Packing(Settings):
    """How rows become shards. The same rows with the same packing give the same bytes."""

    samples_per_shard: int = Field(default=2_000, ge=1, le=100_000)
    """Rows a shard is made of; a shard is one process's piece of work and should stay well below 1 GB."""
    max_side: int | None = Field(default=None, ge=16, le=16_384)
    """Images whose longer side has more pixels are shrunk to this and encoded anew; None keeps every image as it is."""
    max_seconds: float = Field(default=300.0, gt=0, le=36_000)
    """Longer recordings are left out, and counted."""
    check_images: Literal["decode", "header"] = "decode"
    """`decode` finds every image that cannot be read; `header` looks only at its beginning and end, and is several times faster."""


class BadRow(Exception):
    """A row that cannot become a sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """One of a few: what failures are counted by."""
        self.detail = detail
