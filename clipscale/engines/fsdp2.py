"""FSDP2: weights, gradients and optimizer state are cut over the ranks, block by block, and gathered when a block runs.

Zhao et al. 2023, arXiv:2304.11277; torch's fully_shard. The model is built on rank 0 alone; the others build its names and shapes
and are sent their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils._pytree import register_dataclass

from clipscale.engines import Engine, Trainable
from clipscale.engines._footprint import Collective, Footprint, StepShape, Unit, bytes_of, replica, units
from clipscale.engines._replicated import ROUNDED, Replica
from clipscale.engines._sharded import Shards, temperatures
from clipscale.errors import ConfigError, RequestError
from clipscale.model import Encoders, KindOutput
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh

register_dataclass(KindOutput)  # fully_shard looks for tensors in what forward returns, and before torch 2.12 only in known containers


class Fsdp2(Engine):
    """Cut the model over the ranks, block by block; with one rank the same as `local`."""

    shard_ranks: int | None = Field(default=None, gt=0)
    """Ranks that share one copy of the model (HSDP): the GPUs of a node, say; further copies only sum gradients. None: all ranks."""
    tensor_ranks: int = Field(default=1, gt=0)
    """Neighbouring ranks that share every block's heads and hidden units (tensor parallel); they see the same rows of a batch."""
    gathered: Literal["step", "block"] = "step"
    """How long gathered weights stay. `step`: from first use to last, and gradients are added up whole and cut once: micro-batches cost no
    further communication. `block`: for one pass of one block: least memory, but every micro-batch gathers and cuts again."""
    cpu_offload: bool = False
    """Keep each rank's parts and optimizer state in the CPU's memory, and step there."""

    def check_world(self, world: int) -> None:
        """Tensor ranks, parts and copies must multiply to the ranks."""
        if world == 1 and (self.cpu_offload or self.tensor_ranks > 1 or self.shard_ranks not in (None, 1)):
            raise ConfigError("engine 'fsdp2' on 1 rank cuts nothing: cpu_offload, tensor_ranks and shard_ranks need several ranks")
        if world % self.tensor_ranks:
            raise ConfigError(f"engine.tensor_ranks {self.tensor_ranks} does not divide the {world} ranks; these do: {divisors(world)}")
        data_ranks = self.data_ranks(world)
        if data_ranks % (self.shard_ranks or 1):
            of = f"{data_ranks} data ranks ({world} ranks, {self.tensor_ranks} of them to a data rank)"
            raise ConfigError(f"engine.shard_ranks {self.shard_ranks} does not divide the {of}; these do: {divisors(data_ranks)}")

    def check_precision(self, precision: str) -> None:
        """Layers that are cut over tensor ranks are not float8's."""
        if precision == "fp8" and self.tensor_ranks > 1:
            raise ConfigError("precision fp8 does not go with engine.tensor_ranks above 1; set precision: bf16, or tensor_ranks: 1")

    def whole_weights(self, world: int) -> bool:
        """Parts, unless there is one rank."""
        return world == 1

    def data_ranks(self, world: int) -> int:
        """A data rank is a group of tensor ranks."""
        return world // self.tensor_ranks

    def data_mesh(self, mesh: Mesh) -> Mesh:
        """The ranks at this rank's place in every group of tensor ranks."""
        return mesh if self.tensor_ranks == 1 else mesh.across(self.data_ranks(mesh.world))

    def replicas(self, mesh: Mesh) -> Mesh | None:
        """The ranks at this rank's place in every copy of the model (HSDP)."""
        copies = self.data_ranks(mesh.world) // (self.shard_ranks or self.data_ranks(mesh.world))
        return mesh.across(copies) if copies > 1 else None

    def build(self, make: Callable[[], Encoders], mesh: Mesh) -> Encoders:
        """The model on rank 0; on the others its names and shapes."""
        with nullcontext() if mesh.is_main else torch.device("meta"):
            return make()

    def check_model(self, model: Encoders, *, optimizer: Optimizer, steps_differ: bool) -> None:  # noqa: ARG002
        """Every tower's blocks must be known, and divide over the tensor ranks."""
        mistakes = []
        for modality in model.modalities if self.tensor_ranks > 1 else []:
            try:
                model.tower(modality).check_tensor_ranks(self.tensor_ranks)
            except RequestError as error:
                mistakes.append(f"engine.tensor_ranks {self.tensor_ranks} does not suit the {modality} tower: {error}")
            if model.tower(modality).compiled:
                mistakes.append(f"towers.{modality}.compile: tensor ranks communicate inside blocks; set it to false")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def footprint(self, model: Encoders, step: StepShape) -> Footprint:
        """Parts of everything, and what is gathered of it."""
        if step.world == 1:
            return replica(model, parts=step.parts)
        if self.tensor_ranks > 1:
            raise ConfigError("what tensor ranks hold and send cannot be planned yet; plan with engine.tensor_ranks 1")
        return _footprint(self, model, step)

    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:  # noqa: ARG002
        """The model in parts, filled from rank 0."""
        if mesh.world == 1:
            return Replica(model.to(mesh.device), optimizer, mesh.device, precision=precision)
        tensors = _tensors(model) if mesh.is_main else {}
        model.to("meta")
        axes = self._axes(mesh)
        row_orders = _cut(model, axes["tensor"]) if self.tensor_ranks > 1 else {}
        self._shard(model, axes["parts"] if axes["copies"].size() == 1 else axes["copies", "parts"], precision)
        model.to_empty(device="cpu" if self.cpu_offload else mesh.device)
        fused = mesh.device.type == "cuda" and not self.cpu_offload
        shards = _Fsdp2(model, optimizer, mesh, self.data_mesh(mesh), precision=precision, row_orders=row_orders, fused=fused)
        shards.gathered = self.gathered
        _fill(shards, tensors, mesh)
        return shards

    def _axes(self, mesh: Mesh) -> DeviceMesh:
        data_ranks = self.data_ranks(mesh.world)
        parts = self.shard_ranks or data_ranks
        return mesh.device_mesh({"copies": data_ranks // parts, "parts": parts, "tensor": self.tensor_ranks})

    def _shard(self, model: Encoders, axes: DeviceMesh, precision: str) -> None:
        """Cut every block, then what is left of every tower, then the rest; temperatures stay whole."""
        rounded = ROUNDED[precision]
        policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=None if rounded is None else torch.float32)
        offload = CPUOffloadPolicy(pin_memory=axes.device_type == "cuda") if self.cpu_offload else OffloadPolicy()
        again = self.gathered == "block"
        for modality in model.modalities:
            tower = model.tower(modality)
            for part in [*tower.blocks(), tower]:
                fully_shard(part, mesh=axes, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
        fully_shard(
            model, mesh=axes, mp_policy=policy, offload_policy=offload, reshard_after_forward=False, ignored_params=set(temperatures(model))
        )
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sums, not means: the exact loss already is the mean over all ranks
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _footprint(engine: Fsdp2, model: Encoders, step: StepShape) -> Footprint:
    world, parts = step.world, step.parts
    wide, cut = (ROUNDED[step.precision] or torch.float32).itemsize, engine.shard_ranks or world
    every, own = units(model), temperatures(model)
    gathered, reduced = sum(unit.numbers(cut) for unit in every), sum(unit.numbers(cut, with_gradient=True) for unit in every)
    on_device = 0 if engine.cpu_offload else 1
    largest = max(unit.numbers(cut) for unit in every)
    if engine.gathered == "step":
        passes, scattered = {"gathered weights": gathered * wide}, 1
        passes |= {"whole gradients": reduced * 4} if parts > 1 else {"gradients on their way": 2 * 4 * largest}
    else:
        gathered, scattered = sum(_times_gathered(unit, parts) * unit.numbers(cut) for unit in every), parts
        passes = {"gathered blocks": 2 * largest * wide, "gradients on their way": 2 * 4 * largest}
    collectives = [
        Collective("weights", "all_gather", gathered * wide, cut),
        Collective("gradients", "reduce_scatter", reduced * 4 * scattered, cut),
        Collective("temperatures", "all_reduce", bytes_of(own), world, hidden=False),
        Collective("norms", "all_reduce", 8 * (len(model.modalities) + 1), world, hidden=False),
    ]
    if cut < world:
        collectives.append(Collective("gradients of copies", "all_reduce", reduced * 4 // cut, world // cut, stride=cut))
    return Footprint(
        weights=sum(unit.numbers(cut) for unit in every) * 4 // cut * on_device + bytes_of((*own, *model.buffers())),
        gradients=reduced * 4 // cut * on_device,
        state_share=on_device / cut,
        gradients_exist=True,
        while_towers_run=passes,
        rounding="weights",
        collectives=collectives,
    )


def _times_gathered(unit: Unit, parts: int) -> int:
    """How often `gathered: block` gathers a unit in a step: for each pass over it; the root stays until a backward pass ends."""
    if unit.root:
        return parts
    forwards = 1 if parts == 1 else parts if unit.locked else 2 * parts
    for_nothing = unit.fetched_ahead and not (unit.locked and parts > 1)  # cached gradients run a locked tower without what follows
    return forwards + parts * (unit.has_backward or for_nothing)


def divisors(count: int) -> str:
    """Numbers of ranks that fit, for messages."""
    return ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)


def _cut(model: Encoders, axis: DeviceMesh) -> dict[str, Tensor]:
    return {f"towers.{name}.{path}": order for name in model.modalities for path, order in model.tower(name).cut(axis).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _fill(shards: Shards, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    """Rank 0's tensors, sent one by one to all, of which each keeps its parts."""
    for name, tensor in _tensors(shards.model).items():
        value = tensors.pop(name).to(mesh.device) if mesh.is_main else torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device)
        mesh.broadcast(value)
        shards.fill(name, tensor, value)


class _Fsdp2(Shards):
    """A model under fully_shard."""

    gathered: Literal["step", "block"]

    @contextmanager
    def _held(self) -> Iterator[None]:
        self._synchronise(now=False)
        try:
            yield
        finally:
            self._synchronise(now=True)

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Weights stay gathered and gradients whole until the next pass outside; with `gathered: block` only copies wait for each other."""
        return self._held()

    def _synchronise(self, *, now: bool) -> None:
        root = self.model
        assert isinstance(root, FSDPModule)
        if self.gathered == "step":
            root.set_requires_gradient_sync(now)
            root.set_reshard_after_backward(now)
        else:
            root.set_requires_all_reduce(now)
