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


def narrow_wire_error(mesh: Mesh, wires: dict[str, str]) -> float:
    """Largest error of this rank's gradients over their largest, against full precision on the wire."""
    batch = textbook.make_batch(16 * mesh.world, width=32).to(torch.float32)
    rows = slice(mesh.rank * 16, mesh.rank * 16 + 16)
    exact, rounded = (ContrastiveLoss(**options).loss_and_grad(batch.x[rows], batch.y[rows], batch.scale) for options in ({}, wires))
    return float((exact.image_gradient - rounded.image_gradient).abs().max() / exact.image_gradient.abs().max())


@pytest.mark.parametrize(("wires", "least"), [({"feature_wire": "bfloat16"}, 1e-4), ({"gradient_wire": "bfloat16"}, 1e-5), ({}, 0.0)])
def test_a_narrow_wire_costs_digits_and_only_then(ranks, wires, least):
    errors = ranks(4)(narrow_wire_error, wires)
    assert max(errors) <= (2e-2 if wires else 0.0)  # bfloat16 has 8 bits
    assert all(error >= least for error in errors)
