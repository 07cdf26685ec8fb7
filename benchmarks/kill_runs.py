"""Does a run that is killed at 20 random moments, under each engine, end in the curve and the weights of one that nobody killed?

A run of two ranks saves after every step. Each launch is killed with SIGKILL: one random rank or all of them, a random number of steps
and some milliseconds on, or, every other time, while a checkpoint is being written. A launch of which one rank is dead is ended as
torchrun ends it. A run that ends before that is compared, and begun anew from nothing. Printed as JSON; the exit code is 1 when a byte
differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint import small_run, write_pictures

from clipscale.config import Run, validate
from clipscale.parallel.mesh import Mesh
from clipscale.train import train

TEXT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ENGINES: dict[str, Any] = {
    "local": {"name": "local"},
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    **{f"deepspeed {stage}": {"name": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
}
STEPS = 12


def main() -> None:
    """Kill, compare, print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--smoke", action="store_true", help="one kill of ddp, to see that it runs")
    arguments.add_argument("--kills", type=int, default=20, help="of each engine")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    given = arguments.parse_args()
    os.environ.update(
        OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false"
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "clipscale.train", "clipscale.towers.hf_text"])
    kills, engines = (1, ["ddp"]) if given.smoke else (given.kills, given.engines)
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        data = write_pictures(Path(place) / "data", samples=24)
        found = {name: Killing(name, Path(place) / name.replace(" ", ""), data, dice).kill(kills) for name in engines}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    print(json.dumps({"engines": found, "versions": versions}, indent=1))
    sys.exit(any(result["files that differ"] for result in found.values()))


class Killing:
    """One engine's run, killed again and again."""

    def __init__(self, engine: str, place: Path, data: Path, dice: random.Random) -> None:
        self.place, self.data, self.dice = place, data, dice
        self.engine, self.world = ENGINES[engine], 1 if engine == "local" else 2
        place.mkdir()
        self.launches = 0

    def kill(self, kills: int) -> dict[str, Any]:
        """What came of so many kills."""
        self._end(self._launch("whole"))
        done, moments, compared, differ = 0, Counter[str](), 0, set[str]()
        while done < kills:
            ranks = self._launch("hurt")
            if self._wait(ranks, while_writing=done % 2 == 0):
                victims = ranks if self.dice.random() < 0.5 else [self.dice.choice(ranks)]
                moments[f"{self._moment()}, {'all ranks' if len(victims) == self.world else 'one rank'}"] += 1
                done += 1
                for rank in victims:
                    rank.kill()
                time.sleep(self.dice.uniform(0, 0.2))  # the others may go on for a moment
                for rank in ranks:
                    rank.kill()
                    rank.join()
            else:
                self._end(ranks)
                compared, differ = compared + 1, differ | self._differences()
                shutil.rmtree(self.place / "hurt")
        self._end(self._launch("hurt"))
        return {
            "kills": kills,
            "killed while": dict(moments),
            "whole runs compared": compared + 1,
            "files that differ": len(differ | self._differences()),
            "which": sorted(differ | self._differences()),
        }

    def _launch(self, folder: str) -> list[BaseProcess]:
        self.launches += 1
        meeting = self.place / f"meeting{self.launches}"
        checks = {"every_steps": 1, "keep_last": 2}
        settings = small_run(self.place / folder, self.data, steps=STEPS, text=TEXT, engine=self.engine, checkpoints=checks)
        context = multiprocessing.get_context("forkserver")
        ranks = [context.Process(target=run_rank, args=(rank, self.world, str(meeting), settings)) for rank in range(self.world)]
        for rank in ranks:
            rank.start()
        return ranks

    def _wait(self, ranks: list[BaseProcess], *, while_writing: bool) -> bool:
        """Until the moment to kill has come: some steps on, and then some time; false when the run has ended before."""
        after = self.dice.randrange(min(self._newest(), STEPS - 1), STEPS)
        while all(rank.is_alive() for rank in ranks):
            if self._newest() >= after and (self._writes() or not while_writing):
                time.sleep(0 if while_writing else self.dice.uniform(0, 0.2))
                return all(rank.is_alive() for rank in ranks)
            time.sleep(0.0005)
        return False

    def _writes(self) -> bool:
        return any((self.place / "hurt" / "small" / "checkpoints").glob(".step-*.partial"))

    def _newest(self) -> int:
        return max((int(path.name[5:]) for path in (self.place / "hurt" / "small" / "checkpoints").glob("step-*")), default=0)

    def _moment(self) -> str:
        if self._writes():
            return "a checkpoint is written"
        return "a checkpoint is there" if self._newest() else "there is no checkpoint yet"

    def _end(self, ranks: list[BaseProcess]) -> None:
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise SystemExit(f"{self.engine}: ranks ended with {[rank.exitcode for rank in ranks]}")

    def _differences(self) -> set[str]:
        names = ["metrics.jsonl"]
        names += [f"checkpoints/step-{STEPS:08d}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
        return {name for name in names if len({(self.place / run / "small" / name).read_bytes() for run in ("whole", "hurt")}) > 1}


def run_rank(rank: int, world: int, meeting: str, settings: dict[str, Any]) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    train(validate(Run, settings), Mesh(rank=rank, world=world, local_rank=rank, device=torch.device("cpu")))
    if world > 1:
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
