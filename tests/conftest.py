"""What every test shares: an offline, single-threaded process, and `ranks`, persistent gloo ranks for tests of several ranks."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
os.environ["TRITON_INTERPRET"] = "1"  # fused kernels run as numpy; benchmarks/kernel_resources.py compiles them

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipscale.parallel.mesh import Mesh

torch.set_num_threads(1)

ANSWER_S = 120.0
"""Longest time one call on the ranks may take, seconds."""
GRACE_S = 10.0
"""How long the other ranks may take to answer after one has failed, seconds."""


class RanksFailed(Exception):
    """Ranks did not answer, or raised something that cannot be sent between processes."""


class RankPool:
    """W processes in one gloo group that run functions `function(mesh, *args)` and send back what they return.

    They are forked from a clean server process (a fork of pytest itself could not run backward passes) and stay for the session.
    """

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "clipscale.contrast"])  # once, not in each rank at its first use
        self.world = world
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world, str(folder / "rendezvous")), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(mesh, *args)` returns on each rank, in rank order; raises the first failed rank's exception.

        `function` must stand at the top level of its module; arguments and results are sent between processes.
        """
        for pipe in self.pipes:
            pipe.send(sys.path)  # first, so that the rank can import the module that the function stands in
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = self._collect()
        failures = [answer for answer in answers if answer[0] != "returned"]
        if any(answer[0] == "silent" for answer in answers):
            self.stop()
        for kind, error, trace in failures:
            if kind == "raised":
                error.add_note(trace)
                raise error
        if failures:
            raise RanksFailed(
                f"ranks {[rank for rank, answer in enumerate(answers) if answer[0] == 'silent']} of {self.world} gave no answer"
            )
        return [answer[1] for answer in answers]

    def _collect(self) -> list[tuple[str, Any, str]]:
        answers: list[tuple[str, Any, str]] = [("silent", None, "")] * self.world
        open_ranks = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        patience = ANSWER_S
        while open_ranks and (ready := wait(list(open_ranks), patience)):
            for pipe in ready:
                rank = open_ranks.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    continue
                patience = GRACE_S if answers[rank][0] == "raised" else patience
        return answers

    @property
    def alive(self) -> bool:
        """Whether every rank still runs."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """End the ranks this pool started."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(pipe: Connection, rank: int, world: int, rendezvous: str) -> None:
    """The life of one rank: join, then answer calls until the pipe closes."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    mesh = Mesh(rank=rank, world=world, local_rank=rank, device=torch.device("cpu"))
    while True:
        try:
            sys.path[:] = pipe.recv()
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, args = pickle.loads(message)
            answer = ("returned", function(mesh, *args), "")
        except Exception as error:
            answer = ("raised", error, f"raised on rank {rank} of {world}:\n{traceback.format_exc()}")
        _send(pipe, answer)


def _send(pipe: Connection, answer: tuple[str, Any, str]) -> None:
    try:
        pipe.send(answer)
    except Exception as error:  # what was returned or raised cannot be pickled; say so instead of leaving pytest waiting
        pipe.send(("raised", RanksFailed(f"{type(error).__name__}: {error}; while sending {answer[0]}"), answer[2]))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """`ranks(world)(function, *args)` runs `function(mesh, *args)` on `world` gloo ranks and returns their results in rank order."""
    pools: dict[int, RankPool] = {}

    def pool(world: int) -> RankPool:
        if world not in pools or not pools[world].alive:
            pools[world] = RankPool(world, tmp_path_factory.mktemp(f"ranks{world}_"))
        return pools[world]

    yield pool
    for started in pools.values():
        started.stop()
