"""What does watching ranks cost, and does it cry wolf?

Costs are shares of a step of 100 ms, short for a large run: judging stragglers among 1,024 ranks, every step; comparing copies of 100
million parameters, every 100 steps (without the 8 bytes a parameter that travel); the watchdog's thread, processor time in a second.
False alarms are counted over steps of two ranks that train for real, under a limit of two seconds. Printed as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from checkpoint import small_run, write_pictures
from kill_runs import TEXT

from clipscale.config import Run, validate
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.phases.clocks import HostClock
from clipscale.train import train
from clipscale.watch.replicas import check_replicas
from clipscale.watch.stragglers import Stragglers
from clipscale.watch.watchdog import Watchdog

STEP_S = 0.1


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--smoke", action="store_true", help="few steps, to see that it runs")
    arguments.add_argument("--steps", type=int, default=10_000, help="of the two ranks")
    given = arguments.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    measured = {
        "stragglers over step": _stragglers() / STEP_S,
        "replicas over step": _replicas(1 if given.smoke else 100) / (100 * STEP_S),
        "watchdog's thread over time": _watchdog(1.0 if given.smoke else 20.0),
        **_alarms(30 if given.smoke else given.steps),
    }
    print(json.dumps({**measured, "versions": {"torch": importlib.metadata.version("torch")}}, indent=1))


def _stragglers() -> float:
    stragglers = Stragglers(1.2, world=1024)
    seconds = [0.05 + 0.00001 * rank for rank in range(1024)]
    for _ in range(20):
        stragglers.step(seconds)
    return _seconds(lambda: stragglers.step(seconds))


def _replicas(millions: int) -> float:
    weights = [(f"weight {number}", torch.randn(1_000_000)) for number in range(millions)]
    return _seconds(lambda: check_replicas(weights, Mesh.single(), step=1))


def _seconds(do: Callable[[], object]) -> float:
    """Processor time of one call, the median of nine."""
    taken = []
    for _ in range(9):
        began = time.process_time()
        do()
        taken.append(time.process_time() - began)
    return median(taken)


def _watchdog(seconds: float) -> float:
    """Processor time of the process while its main thread sleeps, over the time that passes."""
    timer = PhaseTimer(HostClock(), None)
    with tempfile.TemporaryDirectory() as place:
        began = time.process_time()
        with Watchdog(Path(place), Mesh.single(), timer, step=lambda: 1, limit_s=300.0, patient_s=600.0):
            time.sleep(seconds)
        return (time.process_time() - began) / seconds


def _alarms(steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        data = write_pictures(Path(place) / "data", samples=64)
        changes = {"checkpoints": {"every_steps": max(1, steps // 4)}, "watch": {"hang_s": 2.0, "replicas_every": 10}}
        settings = small_run(Path(place), data, steps=steps, text=TEXT, engine="ddp", **changes)
        torch.multiprocessing.start_processes(_rank, (settings, f"{place}/rendezvous"), nprocs=2, start_method="forkserver")
        run = Path(settings["folder"]) / settings["name"]
        events = Counter(event["event"] for event in read_json_lines(run / "events.jsonl"))
        return {
            "steps": len(read_json_lines(run / "metrics.jsonl")),
            "hangs named": len([*run.glob("hangs/*")]),
            "stragglers named": events["straggler"],
            "steps left out": events["left out"],
        }


def _rank(rank: int, settings: dict[str, Any], rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    train(validate(Run, settings), Mesh(rank=rank, world=2, local_rank=rank, device=torch.device("cpu")))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
