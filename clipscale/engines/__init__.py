"""Engines: how one model's gradients and optimizer steps are shared by the ranks, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Protocol

from clipscale.settings import Part

if TYPE_CHECKING:
    from torch import Tensor

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

    @abstractmethod
    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:
        """The model, on the mesh's device, ready to train; `steps_differ` when some steps leave out a pair kind and its towers."""


class Trainable(Protocol):
    """A model under an engine. Gradients of a backward pass are summed over ranks: the loss is a global mean already."""

    model: Encoders

    def encode(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Embeddings of every pair kind in one graph, in the run's precision."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the loss, summed over ranks unless inside `unsynchronised`."""

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Encoding and backward passes in here leave their gradients on this rank until the next pass outside."""

    def step(self, *, lr: float) -> float:
        """Clip, update the weights, forget the gradients; returns the gradient's global norm before clipping.

        A norm that is not finite leaves the weights as they were.
        """

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything to save, as flat tensors in two files: `model` and `optimizer`, keyed by parameter names."""

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what `state` gave, possibly under another engine.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
