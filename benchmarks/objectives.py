"""What each objective costs beside clip: CPU time of one exact loss with gradients, and how many matrix products that is.

    python benchmarks/objectives.py            B = 2,048, D = 512
    python benchmarks/objectives.py --smoke    seconds

All objectives at their default settings, in tiles, on one CPU thread; the smallest of several interleaved rounds of process CPU time.
How well models train with them is not measured here.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipscale import ContrastiveLoss
from clipscale.objectives import Objective
from clipscale.settings import part_names

TOGETHER = {"name": "clip", "add": ["alignment", "uniformity", "cross_uniformity"]}


def make_inputs(batch: int, width: int) -> dict[str, Tensor]:
    """Unit vectors, a guide and captions of which every fourth comes twice."""
    torch.manual_seed(0)
    x, y, guide = (functional.normalize(torch.randn(batch, width), dim=1) for _ in range(3))
    ids = torch.arange(batch)
    ids[::4] = ids[1::4]
    return {"image_features": x, "text_features": y, "image_guide": guide, "text_guide": guide, "text_ids": ids}


def seconds(loss: ContrastiveLoss, inputs: dict[str, Tensor]) -> float:
    """CPU time of one call, forward and backward."""
    given = inputs | {name: inputs[name].clone().requires_grad_() for name in ("image_features", "text_features")}
    started = time.process_time()
    loss(logit_scale=torch.tensor(14.0, requires_grad=True), logit_bias=torch.tensor(-10.0, requires_grad=True), **given).backward()
    return time.process_time() - started


def measure(batch: int, width: int, rounds: int) -> dict[str, Any]:
    """By objective: CPU time over clip's, and matrix products."""
    losses = {name: ContrastiveLoss(name, cache=0) for name in part_names(Objective.folder)}
    losses["clip + alignment + uniformity + cross_uniformity"] = ContrastiveLoss(Objective.model_validate(TOGETHER), cache=0)
    inputs, best = make_inputs(batch, width), dict.fromkeys(losses, float("inf"))
    for _ in range(rounds):
        for name, loss in losses.items():
            best[name] = min(best[name], seconds(loss, inputs))
    products = {name: loss.cost(batch, width, 1).flops / (2 * batch * batch * width) for name, loss in losses.items()}
    return {f"{name} over clip": round(best[name] / best["clip"], 2) for name in losses} | {
        "products": {name: round(count) for name, count in products.items()}
    }


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=2048)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    batch, width, rounds = (64, 16, 1) if asked.smoke else (asked.batch, asked.width, asked.rounds)
    versions = {name: version(name) for name in ("torch", "clipscale")}
    print(json.dumps({"batch": batch, "width": width, **measure(batch, width, rounds), "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
