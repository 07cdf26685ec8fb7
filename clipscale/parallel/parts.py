"""Tensors of which ranks hold parts: the whole of one, a rank's own part of one, and norms over all parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Replicate

from clipscale.parallel.mesh import Mesh


def whole(tensor: Tensor) -> Tensor:
    """The tensor that ranks hold parts of, on every rank; they ask for it together. What is not in parts is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is, on its device; not cut along dimensions where their sizes differ. No communication."""
    value = value.detach().to(own_part(like).device, copy=True)
    if not isinstance(like, DTensor):
        return value
    placements = [place if _shares(value, like, place) else Replicate() for place in like.placements]
    return distribute_tensor(value, like.device_mesh, placements, src_data_rank=None)


def _shares(value: Tensor, like: Tensor, place: Placement) -> bool:
    dim = getattr(place, "dim", None)
    return dim is not None and dim < value.ndim and value.shape[dim] == like.shape[dim]


def holders(tensor: Tensor, *, world: int) -> int:
    """How many of `world` ranks hold the same part as this one."""
    if not isinstance(tensor, DTensor):
        return world
    parts = 1
    for axis, place in enumerate(tensor.placements):
        parts *= 1 if place.is_replicate() else tensor.device_mesh.size(axis)
    return world // parts


def norms_by_name(tensors: Mapping[str, Sequence[Tensor]], mesh: Mesh) -> dict[str, float]:
    """The norm of each name's tensors, of which all ranks hold parts, each part counted once; the same on every rank."""
    squares = torch.stack([_own_square(parts, mesh) for parts in tensors.values()])
    return dict(zip(tensors, mesh.all_reduce_sum(squares).sqrt().tolist(), strict=True))


def _own_square(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """This rank's share of the sum of squares: 0-d, float64."""
    by_holders: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_holders[holders(tensor, world=mesh.world)].append(own_part(tensor.detach()))
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for count, parts in by_holders.items():
        norms = [norm.to(mesh.device, torch.float64) for norm in torch._foreach_norm(parts)]
        square += torch.stack(norms).square().sum() / count
    return square
