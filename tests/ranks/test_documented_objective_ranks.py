"""The objective that docs/exact_loss.md writes is what it says, on one rank and on six."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import pytest
import textbook
import torch
from torch.nn import functional

from clipscale import ContrastiveLoss
from clipscale.parallel.mesh import Mesh

PAGE = Path(__file__).parents[2] / "docs" / "exact_loss.md"


def loss_of_the_documented_objective(mesh: Mesh) -> tuple[float, list[float]]:
    batch = textbook.make_batch(12)
    temperature = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    rows = slice(mesh.rank * 12 // mesh.world, (mesh.rank + 1) * 12 // mesh.world)
    code = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "my_lab"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "own_temperatures.py").write_text(code, encoding="utf-8")
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            loss = ContrastiveLoss("my_lab.own_temperatures", gradients="global", tile=(2, 3))
        finally:
            sys.path.remove(folder)
            for name in ("my_lab", "my_lab.own_temperatures"):
                sys.modules.pop(name, None)
    x = batch.x[rows].clone().requires_grad_()
    value = loss(x, batch.y[rows], batch.scale, numbers={"temperature": temperature[rows]})
    value.backward()
    return value.item(), x.grad.tolist()


@pytest.mark.parametrize("world", [1, 6])
def test_it_is_what_it_says(ranks, world):
    batch, temperature = textbook.make_batch(12), torch.linspace(0.5, 2, 12, dtype=torch.float64)
    x = batch.x.clone().requires_grad_()
    logits = batch.scale * x @ batch.y.T
    others = logits.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    images = functional.cross_entropy(logits / temperature[:, None], torch.arange(12))
    texts = functional.softplus(others.amax(0) - logits.diagonal()).mean()
    (images + texts).backward()
    answers = ranks(world)(loss_of_the_documented_objective)
    assert all(value == pytest.approx((images + texts).item(), rel=1e-12) for value, _ in answers)
    found = torch.tensor([row for _, rows in answers for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, x.grad, rtol=1e-11, atol=1e-14)
