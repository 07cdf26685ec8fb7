"""DistributedDataParallel: every rank holds the whole model, gradients are all-reduced while the backward pass runs.

Li et al. 2020, arXiv:2006.15704. DDP averages gradients over ranks; the contrastive loss is a global mean already, whose
gradients must be summed, so the loss is multiplied by the number of ranks first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from pydantic import Field
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clipscale.engines import Engine, Trainable
from clipscale.engines._footprint import Collective, Footprint, StepShape, replica, trainable
from clipscale.engines._replicated import Replica
from clipscale.model import Encoders, KindOutput, PreparedKinds
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh


class Ddp(Engine):
    """Replicate the model, all-reduce gradients; with one rank the same as `local`."""

    bucket_mb: int = Field(default=25, gt=0)
    """Gradients are exchanged in buckets of about this many MiB."""

    def check_world(self, world: int) -> None:
        """Any number of ranks will do."""

    def replicas(self, mesh: Mesh) -> Mesh | None:
        """All ranks."""
        return mesh if mesh.world > 1 else None

    def footprint(self, model: Encoders, step: StepShape) -> Footprint:
        """A whole replica, and buckets that are the gradients; those of earlier micro-batches lie beside them."""
        alone = replica(model, parts=step.parts)
        if step.world == 1:
            return alone
        collectives = [Collective("gradients", "all_reduce", alone.gradients, step.world)]
        if step.steps_differ:  # which weights had a gradient: a number for each
            collectives.append(Collective("weights in use", "all_reduce", 4 * len(trainable(model)), step.world))
        beside = {"DDP's buckets beside gradients": alone.gradients} if step.parts > 1 else {}
        return replace(alone, gradients_exist=True, while_towers_run=beside, collectives=collectives)

    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:
        """The model on the device, under DistributedDataParallel when there are several ranks."""
        model = model.to(mesh.device)
        if mesh.world == 1:
            return Replica(model, optimizer, mesh.device, precision=precision)
        return _Replicas(model, optimizer, mesh, precision=precision, bucket_mb=self.bucket_mb, steps_differ=steps_differ)


class _Replicas(Replica):
    """The same replica on every rank."""

    def __init__(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, bucket_mb: int, steps_differ: bool) -> None:
        super().__init__(model, optimizer, mesh.device, precision=precision)
        self._world = mesh.world
        self._distributed = DistributedDataParallel(
            model,
            device_ids=[mesh.device.index] if mesh.device.type == "cuda" else None,
            broadcast_buffers=False,
            bucket_cap_mb=bucket_mb,
            find_unused_parameters=steps_differ,
            gradient_as_bucket_view=True,
        )

    def _forward(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        outputs: dict[str, KindOutput] = self._distributed(kinds)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients, summed over ranks."""
        super().backward(loss * self._world)  # DDP averages over ranks; the exact loss already is the mean

    def unsynchronised(self) -> AbstractContextManager[None]:
        """DDP's no_sync: gradients accumulate here and travel with the next synchronised pass."""
        return self._distributed.no_sync()
