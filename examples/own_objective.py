"""An objective of your own, ten lines, through the exact loss: in tiles, on any number of ranks, with gradients.

    python examples/own_objective.py

DCL (Yeh et al. 2022, arXiv:2110.06848) leaves a sample's own pair out of its softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives import Block, LogSumExp, Objective, Row, Term
from clipscale.parallel.mesh import Mesh


class Dcl(Objective):
    """Decoupled contrastive learning, both directions averaged."""

    def terms(self, block: Block) -> dict[str, Term]:
        return {"negatives": LogSumExp(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return (row["negatives"] - row.positive) / 2


def main(steps: int = 100) -> None:
    """Two linear towers learn which of 256 noisy views belong together."""
    torch.manual_seed(0)
    what = torch.randn(256, 24)
    first, second = (what @ torch.randn(24, 48) + torch.randn(256, 48) for _ in range(2))
    towers = nn.ModuleList([nn.Linear(48, 32), nn.Linear(48, 32)])
    log_scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([*towers.parameters(), log_scale], lr=0.01)
    mesh = Mesh.single()  # under torchrun: clipscale.parallel.mesh.start("auto"), and the pairs of all ranks are one batch
    for step in range(steps + 1):
        x, y = normalize(towers[0](first), dim=1), normalize(towers[1](second), dim=1)
        settings = ContrastSettings(tile_rows=64, tile_columns=64)
        output = contrastive_loss(Dcl(), Pairs(x, y), log_scale.exp(), settings=settings, mesh=mesh)
        if step % (steps // 4) == 0:
            print(f"step {step:4}  loss {output.loss.item():7.4f}  top-1 in the batch {output.metrics['x_to_y_top1'].item():.3f}")
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
