"""What rounding costs: errors of the loss and its gradients with narrower features and narrower wires, by how well pairs are fitted.

    python benchmarks/contrast_rounding.py            2,048 pairs on four gloo ranks
    python benchmarks/contrast_rounding.py --smoke    seconds

Relative errors (of norms; the loss's relative to itself) against the textbook in float64 on one device. Features are float32, D = 256.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives.clip import Clip
from clipscale.parallel.mesh import Mesh

WORLD = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing rounded": {},
    "feature_wire bfloat16": {"feature_wire": "bfloat16"},
    "feature_wire float16": {"feature_wire": "float16"},
    "gradient_wire bfloat16": {"gradient_wire": "bfloat16"},
    "feature_dtype bfloat16": {"feature_dtype": "bfloat16"},
}
LEVELS = {"random": (0.0, 14.3), "half fitted": (1.0, 20.0), "fitted": (1.5, 30.0)}


def make_inputs(batch: int, correlation: float) -> tuple[Tensor, Tensor]:
    """Unit vectors, partners correlated."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 256, generator=draw)
    y = torch.randn(batch, 256, generator=draw) + correlation * x
    return functional.normalize(x, dim=1), functional.normalize(y, dim=1)


def exact(x: Tensor, y: Tensor, scale: float) -> dict[str, Tensor]:
    """CLIP's loss and gradients in float64, in the form that keeps its digits on fitted pairs."""
    leaves = [x.double().requires_grad_(), y.double().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    others = logits.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    loss = sum((-functional.logsigmoid(logits.diagonal() - others.logsumexp(dim)).mean() for dim in (0, 1)), torch.zeros(())) / 2
    found = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), **dict(zip(("x", "y", "scale"), found, strict=True))}


def work(rank: int, folder: str, batch: int) -> None:
    """One rank: every setting at every level, this rank's gradients written down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mesh = Mesh(rank=rank, world=WORLD, local_rank=rank, device=torch.device("cpu"))
    rows = slice(rank * batch // WORLD, (rank + 1) * batch // WORLD)
    told = {}
    for level, (correlation, scale_value) in LEVELS.items():
        x, y = (side[rows].clone().requires_grad_() for side in make_inputs(batch, correlation))
        scale = torch.tensor(scale_value, requires_grad=True)
        for name, settings in SETTINGS.items():
            output = contrastive_loss(Clip(), Pairs(x, y), scale, settings=ContrastSettings(**settings), mesh=mesh)
            gradients = torch.autograd.grad(output.loss, [x, y, scale])
            told[level, name] = {"loss": output.loss.detach(), **dict(zip(("x", "y", "scale"), gradients, strict=True))}
    torch.save(told, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' gradients as one."""
    rows = {side: torch.cat([part[side] for part in parts]).double() for side in ("x", "y")}
    return {"loss": parts[0]["loss"].double(), **rows, "scale": torch.stack([part["scale"].double() for part in parts]).sum()}


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=2048)
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    asked = arguments.parse_args()
    batch = 64 if asked.smoke else asked.batch
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder, batch), nprocs=WORLD)
        ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(WORLD)]
    result: dict[str, Any] = {"batch": batch}
    for level, (correlation, scale) in LEVELS.items():
        expected = exact(*make_inputs(batch, correlation), scale)
        result[f"{level}, loss {float(expected['loss']):.1e}"] = {
            name: {
                leaf: float(f"{float((found - expected[leaf]).norm() / expected[leaf].norm()):.1e}")
                for leaf, found in joined([rank[level, name] for rank in ranks]).items()
            }
            for name in SETTINGS
        }
    result["versions"] = {name: version(name) for name in ("torch", "clipscale")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
