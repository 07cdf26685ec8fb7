"""Checks between ranks: how fast they exchange gradients, and whether their clocks agree."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipscale.doctor.finding import Finding, asked
from clipscale.parallel.mesh import Mesh

MIB = 2**20
_PROBE_NUMBERS = 4 * MIB  # fp32: 16 MiB, about DDP's buckets
_REPEATS = 5
_LEAST_BYTES = {"cuda": 5e9, "cpu": 50e6}
_SKEW_S = 1.0
_LOCAL_TIMEOUT_S = 60


def bandwidth(mesh: Mesh) -> Finding:
    """Bytes a second that each rank sends in an all-reduce: 2(W−1)/W of the tensor, over the median time."""
    tensor = torch.ones(_PROBE_NUMBERS, device=mesh.device)
    times = []
    for _ in range(1 + _REPEATS):  # the first one makes connections
        mesh.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor, group=mesh.group)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        times.append(time.perf_counter() - begun)
    sent = 2 * (mesh.world - 1) / mesh.world * tensor.numel() * tensor.element_size()
    speed = sent / sorted(times[1:])[_REPEATS // 2]
    backend = "NCCL" if mesh.device.type == "cuda" else "gloo"
    found = f"{speed / 1e9:,.2f} GB/s a rank by {backend} over {mesh.world} ranks"
    if speed >= _LEAST_BYTES[mesh.device.type]:
        return Finding("bandwidth", "ok", found)
    advice = "NCCL_DEBUG=INFO says which network it took" if backend == "NCCL" else "GLOO_SOCKET_IFNAME names the network it takes"
    return Finding("bandwidth", "warning", found, f"gradients will wait for the network; {advice}")


def clock_skew(mesh: Mesh) -> Finding:
    """How far the ranks' clocks lie apart, at most: the smallest spread of several looks, each behind a barrier."""
    spreads = []
    for _ in range(_REPEATS):
        mesh.barrier()
        clocks = mesh.gather(torch.tensor(time.time(), dtype=torch.float64, device=mesh.device))
        spreads.append(float(clocks.max() - clocks.min()))
    return judge_skew(min(spreads))


def judge_skew(seconds: float) -> Finding:
    """What clocks that lie so far apart mean."""
    found = f"at most {seconds * 1000:,.1f} ms between the ranks' clocks"
    if seconds <= _SKEW_S:
        return Finding("clock skew", "ok", found)
    return Finding(
        "clock skew",
        "warning",
        found,
        "let the machines keep time by NTP: logs of several machines, and signed requests to stores, need it",
    )


def between_ranks(mesh: Mesh) -> list[Finding]:
    """All checks between the ranks of a mesh; all ranks ask together."""
    return [asked("bandwidth", partial(bandwidth, mesh)), asked("clock skew", partial(clock_skew, mesh))]


def between_two_processes() -> list[Finding]:
    """The same between two gloo processes of this machine, for a command that was not launched as ranks."""
    context = multiprocessing.get_context("spawn")  # a fork of this process would carry its threads' locks
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=context) as pool:
        of_ranks = list(pool.map(partial(_as_rank, folder), range(2), timeout=2 * _LOCAL_TIMEOUT_S))
    return [Finding(**finding) for finding in of_ranks[0]]


def _as_rank(folder: str, rank: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder) / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=_LOCAL_TIMEOUT_S))
    mesh = Mesh(rank=rank, world=2, local_rank=rank, device=torch.device("cpu"))
    findings = between_ranks(mesh)
    mesh.barrier()
    dist.destroy_process_group()
    return [asdict(finding) for finding in findings]
