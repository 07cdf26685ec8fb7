"""Multi-positive objectives: which combinations are positives besides a sample's own pair."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from clipscale.objectives import Block

Positives = Literal["same_text", "label"]


def positives(block: Block, kind: Positives) -> Tensor | None:
    """True where row and column belong together, pairs included: [n, m]; None in blocks of extra samples, which are nobody's positives."""
    if kind == "same_text":
        return block.same_text
    if block.extra is not None:
        return None
    rows, columns = block.numbers["label"]
    return rows == columns
