"""Margin: a pair must be closer than others by so much, or may be farther.

InterCLR, Xie et al. 2020, arXiv:2008.03702, section 3.4 (value as in the official code, open-mmlab/mmselfsup): in the softmax, the pair's
cosine is lowered by a margin. The paper's −0.5 is for positives that are only probably right, as noisy captions are: they need not be as
close. A positive margin is CosFace's, Wang et al. 2018, arXiv:1801.09414: they must be closer than the softmax alone would ask.

    loss_i = softplus(u_i − s (cosine_ii − margin)),      both directions averaged

With margin 0 it is CLIP. The paper's semi-hard negatives from a memory bank are not part of this.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Row, Term, softplus


class Margin(Objective):
    """Softmax cross-entropy with a margin on each pair's cosine."""

    takes_extras: ClassVar[bool] = True

    margin: float = Field(default=-0.5, ge=-2.0, le=2.0)
    """Taken off the pair's cosine; below 0: less stringent. InterCLR's −0.5 between images."""

    def terms(self, block: Block) -> dict[str, Term]:
        return {"negatives": LogSumExp(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return softplus(row["negatives"] - row.positive + row.scale * self.margin) / 2
