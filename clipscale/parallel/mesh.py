"""Mesh: which rank this process is, which device it has, and the few words ranks say to each other outside the loss.

A run on one device has a mesh of one rank and no process group; every method then answers without communication.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from clipscale.errors import ConfigError
from clipscale.phases import phase

DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Grid:
    """The ranks of a mesh as R×C: rank = row·C + column, so that a grid row is C neighbouring ranks."""

    rows: int
    columns: int
    row: int
    """This rank's row, 0…R−1."""
    column: int
    """This rank's column, 0…C−1."""
    row_group: dist.ProcessGroup | None
    """The C ranks of this rank's grid row; None when the row is this rank alone."""
    column_group: dist.ProcessGroup | None
    """The R ranks of this rank's grid column; None when the column is this rank alone."""

    @property
    def row_ranks(self) -> list[int]:
        """Ranks of this grid row, in order."""
        return [self.row * self.columns + column for column in range(self.columns)]

    @property
    def column_ranks(self) -> list[int]:
        """Ranks of this grid column, in order."""
        return [row * self.columns + self.column for row in range(self.rows)]


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The ranks of this mesh; None is torch's default group (or, with one rank, no group at all)."""
    _grids: dict[int, Grid] = field(default_factory=dict, init=False, repr=False, compare=False)
    _parts: dict[int, Mesh] = field(default_factory=dict, init=False, repr=False, compare=False)
    _across: dict[int, Mesh] = field(default_factory=dict, init=False, repr=False, compare=False)
    _device_meshes: dict[tuple[int, ...], DeviceMesh] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Mesh:
        """One rank alone, without a process group."""
        return cls(rank=0, world=1, local_rank=0, device=torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """The group of all ranks of this mesh; None when there is one rank."""
        if self.world == 1:
            return None
        return self.group if self.group is not None else dist.group.WORLD

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            self.all_reduce_sum(torch.zeros(1, device=self.device))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor without gradient."""
        total = tensor.detach().clone()
        if self.world > 1:
            with phase("communication"):
                dist.all_reduce(total, group=self.group)
        return total

    def all_reduce_max(self, value: int) -> int:
        """The largest of every rank's integer."""
        if self.world == 1:
            return value
        largest = torch.tensor([value], device=self.device, dtype=torch.int64)
        with phase("communication"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest.item())

    def broadcast(self, tensor: Tensor) -> None:
        """Every rank's tensor becomes rank 0's, in place."""
        if self.world > 1:
            with phase("communication"):
                dist.broadcast(tensor, group=self.group, group_src=0)

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor of one and the same shape, in rank order: [...] -> [W, ...], without gradient."""
        own = tensor.detach().contiguous()
        if self.world == 1:
            return own.unsqueeze(0)
        gathered = own.new_empty((self.world, *own.shape))
        with phase("communication"):
            dist.all_gather_into_tensor(gathered.view(-1), own.view(-1), group=self.group)
        return gathered

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's JSON-able object, in rank order; tuples arrive as lists. Nothing is pickled."""
        if self.world == 1:
            return [json.loads(json.dumps(item))]
        text = torch.tensor(list(json.dumps(item).encode()), dtype=torch.uint8, device=self.device)
        lengths = self.gather(torch.tensor(text.numel(), device=self.device)).tolist()
        padded = text.new_zeros(max(lengths))
        padded[: text.numel()] = text
        rows = self.gather(padded).cpu()
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]

    def grid(self, rows: int | None = None) -> Grid:
        """The ranks as `rows` × W/rows, by default as square as can be; made once per mesh, by all ranks together.

        Raises:
            ConfigError: `rows` does not divide the number of ranks.
        """
        rows, columns = grid_shape(self.world, rows)
        if rows not in self._grids:
            self._grids[rows] = self._make_grid(rows, columns)
        return self._grids[rows]

    def part(self, count: int) -> Mesh:
        """The mesh of this rank's part, of `count` parts of consecutive ranks; made once per mesh, by all ranks together."""
        if count not in self._parts:
            size = self.world // count
            parts = [list(range(start, start + size)) for start in range(0, self.world, size)]
            groups = [self._subgroup(ranks) for ranks in parts]
            number, rank = divmod(self.rank, size)
            self._parts[count] = Mesh(rank, size, self.local_rank, self.device, groups[number])
        return self._parts[count]

    def across(self, count: int) -> Mesh:
        """The mesh of this rank and those at its place in each of `count` parts; made once per mesh, by all ranks together."""
        if count not in self._across:
            size = self.world // count
            groups = [self._subgroup(list(range(place, self.world, size))) for place in range(size)]
            number, place = divmod(self.rank, size)
            self._across[count] = Mesh(number, count, self.local_rank, self.device, groups[place])
        return self._across[count]

    def device_mesh(self, axes: Mapping[str, int]) -> DeviceMesh:
        """All ranks as torch's mesh of named axes, the last one of neighbouring ranks; made once per shape, by all ranks together."""
        shape = tuple(axes.values())
        if shape not in self._device_meshes:
            assert self.group is None, "torch's meshes are made of all ranks"
            self._device_meshes[shape] = init_device_mesh(self.device.type, shape, mesh_dim_names=tuple(axes))
        return self._device_meshes[shape]

    def _make_grid(self, rows: int, columns: int) -> Grid:
        lines = [[row * columns + column for column in range(columns)] for row in range(rows)]
        row, column = divmod(self.rank, columns)
        row_groups = [self._subgroup(line) for line in lines]
        column_groups = [self._subgroup(list(line)) for line in zip(*lines, strict=True)]
        return Grid(rows, columns, row, column, row_groups[row], column_groups[column])

    def _subgroup(self, ranks: list[int]) -> dist.ProcessGroup | None:
        """A group of some of the mesh's ranks; all ranks must ask for the same groups in the same order."""
        if len(ranks) == 1:
            return None
        if len(ranks) == self.world:
            return self.everyone
        members = ranks if self.group is None else [dist.get_global_rank(self.group, rank) for rank in ranks]
        subgroup: dist.ProcessGroup = dist.new_group(members)
        return subgroup


def grid_shape(world: int, rows: int | None = None) -> tuple[int, int]:
    """Rows and columns of `world` ranks: so many rows or, by default, as square as can be and no more rows than columns.

    Raises:
        ConfigError: `rows` does not divide the number of ranks.
    """
    fitting = [count for count in range(1, world + 1) if world % count == 0]
    if rows is None:
        rows = max(count for count in fitting if count <= math.isqrt(world))
    if rows not in fitting:
        raise ConfigError(f"grid_rows {rows} does not divide the {world} ranks; these do: {', '.join(map(str, fitting))}")
    return rows, world // rows


def start(device: DeviceName = "auto", *, timeout_s: float = 600.0) -> Mesh:
    """Join the ranks that torchrun started (it sets RANK, WORLD_SIZE and LOCAL_RANK), or be one rank alone.

    CUDA ranks speak NCCL, others gloo. A rank that hears nothing for `timeout_s` seconds fails.

    Raises:
        ConfigError: CUDA was asked for and is not there, or the environment variables make no sense.
    """
    rank, world, local_rank = (_from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= rank < world:
        raise ConfigError(f"the environment says RANK={rank} of WORLD_SIZE={world}; start ranks with torchrun, or unset both for one rank")
    own = _pick_device(device, local_rank)
    if world > 1:
        backend = "nccl" if own.type == "cuda" else "gloo"
        bound = own if own.type == "cuda" else None
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s), device_id=bound)
    return Mesh(rank=rank, world=world, local_rank=local_rank, device=own)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"environment variable {name} must be a whole number ≥ 0, it is '{value}'")
    return int(value)


def _pick_device(device: DeviceName, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA device here; use 'auto' or 'cpu'")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank} has no GPU of its own: {count} found; start at most {count} ranks on this machine")
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def stop(mesh: Mesh) -> None:
    """Leave the ranks after success: wait for all, then take the group down. After a failure, just exit: others may be gone."""
    if mesh.world > 1:
        mesh.barrier()  # without it rank 0 can die with "terminate called without an active exception"
        dist.destroy_process_group()
