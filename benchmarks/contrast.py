"""How long the exact loss takes, and how much memory, beside open_clip's losses and beside its floor of bare matrix products.

    python benchmarks/contrast.py            B = 8,192, D = 512
    python benchmarks/contrast.py --smoke    seconds

Forward and backward on one CPU thread. Every figure is a ratio within one run: times are the smallest of several
interleaved rounds of process CPU time, memory is the growth of a fresh process's peak resident set.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

Step = Callable[[Tensor, Tensor, Tensor], object]


def open_clip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """open_clip's ClipLoss, forward and backward."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(x, y, scale).backward()


def open_clip_siglip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """open_clip's SigLipLoss, forward and backward, in chunks where it knows them."""
    from open_clip.loss import SigLipLoss

    known = inspect.signature(SigLipLoss).parameters
    loss = SigLipLoss(**({"chunk_size": 512} if "chunk_size" in known else {}))
    return loss(x, y, scale, torch.tensor(-10.0, requires_grad=True)).backward()


def clipscale_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Ours, as a drop-in."""
    from clipscale import ContrastiveLoss

    return ContrastiveLoss("clip", cache=0)(x, y, scale).backward()


def cached_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Ours, keeping all logits."""
    from clipscale import ContrastiveLoss

    return ContrastiveLoss("clip", cache=4 * len(x) * len(y))(x, y, scale).backward()


def siglip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Ours, the sigmoid loss."""
    from clipscale import ContrastiveLoss

    return ContrastiveLoss("siglip", cache=0)(x, y, scale, torch.tensor(-10.0, requires_grad=True)).backward()


def four_products(x: Tensor, y: Tensor, _: Tensor) -> object:
    """The floor of any loss that holds no full matrix: logits twice, two gradients, in the same tiles."""
    with torch.no_grad():
        gradients = torch.zeros_like(x), torch.zeros_like(y)
        for row in range(0, len(x), TILE):
            for column in range(0, len(y), TILE):
                rows, columns = x[row : row + TILE], y[column : column + TILE]
                rows @ columns.T
                logits = rows @ columns.T
                gradients[0][row : row + TILE].addmm_(logits, columns)
                gradients[1][column : column + TILE].addmm_(logits.T, rows)
    return gradients


TILE = 512  # clipscale's on a CPU
STEPS: dict[str, Step] = {
    "open_clip": open_clip_step,
    "open_clip siglip": open_clip_siglip_step,
    "clipscale": clipscale_step,
    "clipscale cached": cached_step,
    "clipscale siglip": siglip_step,
    "four products": four_products,
}


def make_inputs(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors and a scale, all wanting gradients."""
    torch.manual_seed(0)
    x, y = (functional.normalize(torch.randn(batch, width), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(1 / 0.07, requires_grad=True)


def cpu_seconds(batch: int, width: int, rounds: int) -> dict[str, float]:
    """Smallest CPU time of each step over interleaved rounds."""
    best = dict.fromkeys(STEPS, float("inf"))
    for _ in range(rounds):
        for name, step in STEPS.items():
            inputs = make_inputs(batch, width)
            started = time.process_time()
            step(*inputs)
            best[name] = min(best[name], time.process_time() - started)
    return best


def peak_growth_bytes(name: str, batch: int, width: int) -> int:
    """Growth of the peak resident set over one step, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--batch", str(batch), "--width", str(width)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak_growth(name: str, batch: int, width: int) -> None:
    """What `peak_growth_bytes` starts: a small step first, so that imports and buffers are not counted."""
    STEPS[name](*make_inputs(64, width))
    inputs = make_inputs(batch, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = peak_resident_bytes()
    STEPS[name](*inputs)
    print(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """This process's peak resident set, Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=8192)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    arguments.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    if asked.peak_of:
        return print_peak_growth(asked.peak_of, asked.batch, asked.width)
    batch, rounds = (512, 1) if asked.smoke else (asked.batch, asked.rounds)
    seconds = cpu_seconds(batch, asked.width, rounds)
    memory = {name: peak_growth_bytes(name, batch, asked.width) for name in ("open_clip", "clipscale")}
    smaller = peak_growth_bytes("clipscale", batch // 2, asked.width)
    result = {
        "batch": batch,
        "width": asked.width,
        "time over open_clip": round(seconds["clipscale"] / seconds["open_clip"], 3),
        "time over four products": round(seconds["clipscale"] / seconds["four products"], 3),
        "cached time over open_clip": round(seconds["clipscale cached"] / seconds["open_clip"], 3),
        "siglip time over open_clip siglip": round(seconds["clipscale siglip"] / seconds["open_clip siglip"], 3),
        "memory over open_clip": round(memory["clipscale"] / max(1, memory["open_clip"]), 3),
        "memory MB": {name: round(grown / 1e6) for name, grown in memory.items()},
        "memory exponent": round(math.log2(memory["clipscale"] / max(1, smaller)), 2),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "clipscale")},
    }
    print(json.dumps(result, indent=1))
    return None


if __name__ == "__main__":
    main()
