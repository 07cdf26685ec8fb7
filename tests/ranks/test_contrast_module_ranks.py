"""The drop-in loss under DDP gives every rank the gradient of one process on the whole batch."""

from __future__ import annotations

import pytest
import textbook
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clipscale import ContrastiveLoss
from clipscale.parallel.mesh import Mesh


class Model(torch.nn.Module):
    """Two linear towers and a temperature, as a trainer would wrap them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (torch.nn.Linear(12, 6, bias=False, dtype=torch.float64) for _ in range(2))
        self.log_scale = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        with torch.no_grad():
            self.image.weight.copy_(torch.linspace(-1, 1, 72).reshape(6, 12))
            self.text.weight.copy_(torch.linspace(1, -2, 72).reshape(6, 12).sin())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y = (torch.nn.functional.normalize(side, dim=1) for side in (self.image(x), self.text(y)))
        return x, y, self.log_scale.exp()


def train_step(mesh: Mesh, gradients: str, subgroup: bool) -> list[list[float]]:
    """Gradients after one backward pass, averaged by DDP (or added by hand)."""
    batch = textbook.make_batch(12)
    group = dist.new_group(list(range(mesh.world))) if subgroup and mesh.world > 1 else None
    rows = slice(mesh.rank * 12 // mesh.world, (mesh.rank + 1) * 12 // mesh.world)
    model = Model()
    wrapped = DistributedDataParallel(model) if gradients == "ddp" and mesh.world > 1 else model
    ContrastiveLoss("clip", gradients=gradients, group=group, tile=3)(*wrapped(batch.x[rows], batch.y[rows])).backward()
    found = [parameter.grad for parameter in model.parameters()]
    if gradients == "global":
        found = [mesh.all_reduce_sum(gradient) for gradient in found]
    return [gradient.flatten().tolist() for gradient in found]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("gradients", "subgroup"), [("ddp", False), ("ddp", True), ("global", False)])
def test_every_parameter_gets_the_gradient_of_one_process(ranks, world, gradients, subgroup):
    [alone] = ranks(1)(train_step, "ddp", False)
    for answer in ranks(world)(train_step, gradients, subgroup):
        for found, expected in zip(answer, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-11, abs=1e-14)
