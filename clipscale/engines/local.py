"""One process, one device: no communication at all."""

from __future__ import annotations

from clipscale.engines import Engine, Trainable
from clipscale.engines._footprint import Footprint, StepShape, replica
from clipscale.engines._replicated import Replica
from clipscale.errors import ConfigError
from clipscale.model import Encoders
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh


class Local(Engine):
    """Train in this process alone."""

    def check_world(self, world: int) -> None:
        """One rank only."""
        if world != 1:
            raise ConfigError(f"engine 'local' is for one process, and {world} were launched; set engine: ddp")

    def footprint(self, model: Encoders, step: StepShape) -> Footprint:
        """A whole replica; nothing is sent."""
        return replica(model, parts=step.parts)

    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:  # noqa: ARG002
        """The model on the device, unchanged."""
        return Replica(model.to(mesh.device), optimizer, mesh.device, precision=precision)
