"""M2-Encoder's grouped loss, for comparison: negatives of the own group only. An approximation of the global loss, not the global loss.

Guo et al. 2024, arXiv:2401.15896 (GBA-ITC; the training code was never published, so this is a reading: UNVERIFIED). The global batch is
cut into groups of consecutive pairs, each group is a CLIP batch of its own, and the loss is the groups' mean. One group is CLIP. The
exact loss on a grid of ranks moves as many bytes as an all-gather within groups of √W ranks would (docs/exact_loss.md).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Row, Terms, softplus


class M2Grouped(Objective):
    """CLIP within groups of the global batch."""

    num_groups: int = Field(default=1, ge=1)
    """Groups in the global batch; their number divides that of the ranks or is a multiple of it. 1 is CLIP."""

    @property
    def groups(self) -> int:
        return self.num_groups

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return softplus(row["negatives"] - row.positive) / 2
