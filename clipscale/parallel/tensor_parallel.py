"""Tensor parallelism: a layer's outputs are cut over neighbouring ranks, the next layer's inputs likewise, and sums make the result whole.

Shoeybi et al. 2019, arXiv:1909.08053, section 3. Weights are DTensors on the mesh's tensor axis, so that sharding, norms and
checkpoints know what they are parts of; arithmetic is on the parts. Between such pairs of layers activations are whole, and the same on all
tensor ranks.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional

from clipscale.phases import phase


class Region:
    """What lies between layers cut by columns and the layer cut by rows that ends them: attention heads, or hidden units."""

    def __init__(self, mesh: DeviceMesh, *, random: bool) -> None:
        """
        Args:
            mesh: the tensor axis.
            random: numbers are drawn inside, by dropout, which must not be the same on all ranks.
        """
        self.mesh = mesh
        self.random = random
        self._input: weakref.ref[Tensor] | None = None
        self._entered: Tensor | None = None
        self._outside: tuple[Tensor, Tensor | None] | None = None

    def enter(self, x: Tensor) -> Tensor:
        """A whole tensor on its way into layers cut by columns; query, key and value share one sum of its gradient."""
        if self._input is None or self._input() is not x or self._entered is None:
            self._input, self._entered = weakref.ref(x), _Enter.apply(x, self.mesh.get_group())  # type: ignore[no-untyped-call]
            if self.random:
                self._draw_own_numbers(x.device)
        return self._entered

    def leave(self, x: Tensor) -> Tensor:
        """The sum of all ranks' parts of the result."""
        return _Leave.apply(x, self.mesh.get_group())  # type: ignore[no-untyped-call, no-any-return]

    def forget(self) -> None:
        """The inside is over: random numbers are the same on all ranks again, and no tensor is kept."""
        self._input = self._entered = None
        if self._outside is not None:
            cpu, cuda = self._outside
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
            self._outside = None

    def _draw_own_numbers(self, device: torch.device) -> None:
        own = int(torch.randint(2**60, ())) + self.mesh.get_local_rank()
        self._outside = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        torch.manual_seed(own)


class _Enter(torch.autograd.Function):
    """The same forwards; backwards the sum over ranks of what each knows of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        with phase("communication"):
            dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum over ranks forwards; the same backwards, for every rank's part counts once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        with phase("communication"):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class ColumnLinear(nn.Module):
    """A linear layer of which this rank has some outputs, named and saved as the whole one."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        super().__init__()
        self.weight = cut(whole.weight, region.mesh, dim=0)
        self.bias = None if whole.bias is None else cut(whole.bias, region.mesh, dim=0)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out / ranks]."""
        return functional.linear(self.region.enter(x), part(self.weight), None if self.bias is None else part(self.bias))


class RowLinear(nn.Module):
    """A linear layer of which this rank has some inputs; the bias is whole on every rank, and added once."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        super().__init__()
        self.weight = cut(whole.weight, region.mesh, dim=1)
        self.bias = whole.bias
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / ranks] -> [..., out]."""
        self.region.forget()
        total = self.region.leave(functional.linear(x, part(self.weight)))
        return total if self.bias is None else total + self.bias


def cut(parameter: Tensor, mesh: DeviceMesh, *, dim: int) -> nn.Parameter:
    """A parameter of which each rank of the mesh keeps its part along a dimension."""
    parts = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(parts, requires_grad=parameter.requires_grad)


def part(parameter: Tensor) -> Tensor:
    """This rank's part, for arithmetic; its gradient is that part's gradient."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def packed_order(rows: int, *, pieces: int, ranks: int) -> Tensor:
    """Row numbers of `pieces` stacked matrices (query, key, value), so that cutting the stack gives each rank its rows of every one."""
    return torch.arange(rows).view(pieces, ranks, -1).transpose(0, 1).reshape(-1)
