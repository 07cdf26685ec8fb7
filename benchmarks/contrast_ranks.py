"""How long the exact loss takes on two ranks, beside open_clip's and, where it can be imported, Inf-CL's ring.

    python benchmarks/contrast_ranks.py            4,096 pairs on two gloo ranks
    python benchmarks/contrast_ranks.py --smoke    seconds

Forward and backward, one thread a rank. Figures are ratios of process CPU time, added over the ranks, the smallest of several interleaved
rounds. Inf-CL (`pip install inf_cl`) runs on CPUs from two ranks on only, by its `cal_ring_loss`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional

WORLD = 2


def clipscale_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Ours, as a drop-in."""
    from clipscale import ContrastiveLoss

    return ContrastiveLoss("clip", cache=0)(x, y, scale).backward()


def open_clip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """ClipLoss as trainers run it on many ranks."""
    from open_clip.loss import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=WORLD)(x, y, scale).backward()


def inf_cl_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Inf-CL's ring, both directions."""
    from inf_cl import cal_ring_loss

    return ((cal_ring_loss(x, y, scale=scale).mean() + cal_ring_loss(y, x, scale=scale).mean()) / 2).backward()


STEPS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], str]] = {
    "clipscale": (clipscale_step, "clipscale"),
    "open_clip": (open_clip_step, "open_clip"),
    "inf_cl": (inf_cl_step, "inf_cl"),
}


def work(rank: int, folder: str, batch: int, rounds: int) -> None:
    """One rank: measure every step, write this rank's seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    best = {name: float("inf") for name, (_, package) in STEPS.items() if importlib.util.find_spec(package)}
    torch.manual_seed(rank)
    for _ in range(rounds):
        for name in best:
            x, y = (functional.normalize(torch.randn(batch // WORLD, 512), dim=1).requires_grad_() for _ in range(2))
            dist.barrier()
            started = time.process_time()
            STEPS[name][0](x, y, torch.tensor(1 / 0.07, requires_grad=True))
            best[name] = min(best[name], time.process_time() - started)
    Path(folder, f"{rank}.json").write_text(json.dumps(best))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    asked = arguments.parse_args()
    batch, rounds = (128, 1) if asked.smoke else (asked.batch, asked.rounds)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder, batch, rounds), nprocs=WORLD)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    seconds = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    result = {
        "batch": batch,
        **{f"time over {name}": round(seconds["clipscale"] / taken, 3) for name, taken in seconds.items() if name != "clipscale"},
        "absent": [name for name in STEPS if name not in seconds],
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "clipscale")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
