"""Engines: how one model's gradients and optimizer steps are shared by the ranks, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from clipscale.errors import ConfigError
from clipscale.settings import Part

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.engines._footprint import Footprint, StepShape
    from clipscale.model import Encoders, KindOutput, PreparedKinds
    from clipscale.optim import Optimizer
    from clipscale.parallel.mesh import Mesh


class Engine(Part, ABC):
    """A way to train one model on all ranks: `wrap` gives something that encodes, steps, saves and loads."""

    folder: ClassVar[str] = "clipscale.engines"

    @abstractmethod
    def check_world(self, world: int) -> None:
        """Refuse a number of ranks this engine cannot use.

        Raises:
            ConfigError: says which engine can.
        """

    def check_precision(self, precision: str) -> None:
        """Refuse an arithmetic of the towers that this engine does not know.

        Raises:
            ConfigError: says which it knows.
        """

    def whole_weights(self, world: int) -> bool:  # noqa: ARG002
        """Whether a rank's optimizer sees whole tensors, and not its own parts of them: some optimizers need to."""
        return True

    def data_ranks(self, world: int) -> int:
        """How many of `world` ranks split the global batch; each of them may stand for several that share its rows."""
        return world

    def data_mesh(self, mesh: Mesh) -> Mesh:
        """The ranks that split the global batch, as this rank sees them; all ranks ask together."""
        return mesh

    def replicas(self, mesh: Mesh) -> Mesh | None:  # noqa: ARG002
        """The ranks whose parameters, or parts of them, are copies of this rank's; None: no other's, or the engine
        itself makes them the same at every step (ZeRO sends each part from the rank that owns it). All ranks ask together."""
        return None

    def build(self, make: Callable[[], Encoders], mesh: Mesh) -> Encoders:  # noqa: ARG002
        """The model to check and wrap: as it is made, or on some ranks without storage, on the meta device.

        No collective may stand in here: a rank that cannot build leaves early.
        """
        return make()

    def check_model(self, model: Encoders, *, optimizer: Optimizer, steps_differ: bool) -> None:
        """Refuse what this engine cannot train; nothing is changed, nothing has been written yet.

        Args:
            steps_differ: some steps leave out a pair kind and its towers.

        Raises:
            ConfigError: says what stands in the way, and what would fit.
        """

    def footprint(self, model: Encoders, step: StepShape) -> Footprint:  # noqa: ARG002
        """What a step holds on a rank and sends between ranks: for plans, from a model that may stand on the meta device.

        Raises:
            ConfigError: this engine cannot tell; says what can be planned instead.
        """
        raise ConfigError(f"engine '{type(self).__name__.lower()}' does not tell what it holds and sends; plan with engine ddp or fsdp2")

    @abstractmethod
    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:
        """What `build` gave, on the mesh's device, ready to train; all ranks wrap together.

        Args:
            mesh: all ranks.
            steps_differ: some steps leave out a pair kind and its towers.
        """


@dataclass(frozen=True)
class Stepped:
    """What a step of the optimizer met; the same on every rank."""

    norm: float
    """Of all gradients together, before clipping; when it is no finite number, the weights are as they were."""
    norms: dict[str, float]
    """The same of each tower with its projection, and of the temperatures and biases."""
    skipped: bool = False
    """fp16 gradients overflowed: the loss scale has been lowered, and the next step may go well."""
    loss_scale: float | None = None
    """What the loss was multiplied by, under fp16."""


class Trainable(Protocol):
    """A model under an engine. Gradients of a backward pass are summed over data ranks: the loss is a global mean already."""

    model: Encoders
    """For what it says about itself; its parameters may lie anywhere, in parts."""

    def encode(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Embeddings of every pair kind in one graph, in the run's precision."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the loss, summed over data ranks unless inside `unsynchronised`."""

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Passes in here need not be summed over ranks yet: the next pass outside, before `step`, sums them with its own."""

    def step(self, *, lr: float) -> Stepped:
        """Clip, update the weights and their average, forget the gradients. A norm that is not finite leaves the weights as they were."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything to save, as flat, whole tensors by file: `model`; `optimizer`, as `parameter name/field`; `average`, if one is kept.

        All ranks call it together; only rank 0's answer is complete.
        """

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what `state` gave on rank 0, possibly under another engine; every rank is given all of it.

        No collective may stand in here: a rank that cannot leaves early.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
