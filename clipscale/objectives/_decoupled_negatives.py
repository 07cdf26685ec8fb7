"""What DCL and DCLW sum over: everything but the pair itself, of the other modality or of both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipscale.objectives import MAIN, Block, LogSumExp, Product, Row

Negatives = Literal["other", "both"]


def products(kind: Negatives) -> tuple[Product, ...]:
    """The blocks of logits that this takes."""
    return (MAIN,) if kind == "other" else (MAIN, ("x", "x"), ("y", "y"))


def where_any_negative(row: Row, loss: Tensor) -> Tensor:
    """The loss, and 0 for pairs without any negative, where it would be −∞: [n]."""
    return loss.masked_fill(row["negatives"] == -torch.inf, 0)


def negatives(block: Block) -> list[LogSumExp]:
    """One log-sum-exp a side, over its negatives of the other modality and, where the block has them, of its own."""
    out = block.left_out()
    parts = [LogSumExp(block.logits, out)]
    if ("x", "x") in block.products:
        parts += [LogSumExp(block.products["x", "x"], out, "x"), LogSumExp(block.products["y", "y"], out, "y")]
    return parts
