"""Optimizers, one file each: how gradients become steps; parameter groups, layer-wise rates, and the schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipscale.optim._schedule import Schedule
from clipscale.settings import Part


@dataclass(frozen=True)
class Place:
    """Where in the model a parameter stands."""

    from_output: int = 0
    """Blocks from its tower's output: 0 for what stands after the last block and outside the towers, 1 for the last block, and so on."""
    in_block: bool = False
    """Whether it belongs to one of the tower's repeated blocks."""


class Optimizer(Part, ABC):
    """How gradients become steps. A mapping without a name is AdamW."""

    folder: ClassVar[str] = "clipscale.optim"
    default: ClassVar[str] = "adamw"
    adam_state: ClassVar[bool] = False
    """Whether its state is AdamW's and every number steps by itself: then weights can be cut anywhere, also within rows."""
    needs_whole_weights: ClassVar[bool] = False
    """Whether it cannot step on parts of a tensor."""

    lr: float = Field(gt=0)
    """Learning rate at the top of the schedule."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Applied to matrices only: not to biases, norms, temperatures and positions of fewer than two dimensions."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this global norm; none: never."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """The learning rate of each block is this times that of the next one, counted from the output (BEiT, Bao et al. 2021,
    arXiv:2106.08254); for fine-tuning pretrained towers. None: one rate for all."""
    average_decay: float | None = Field(default=None, gt=0, lt=1)
    """Also keep an exponential moving average of the weights: average = this × average + (1 − this) × weights after each step. It is saved
    in checkpoints and evaluated with `clipscale eval --average`."""

    def check(self) -> None:
        """Refuse what cannot be made here.

        Raises:
            MissingPackage: names the package.
        """

    def build(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, places: Mapping[str, Place] | None = None, fused: bool
    ) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters; `fused`: they lie on a GPU, where one kernel may do a step."""
        return self.make(self._groups(parameters, places or {}), fused=fused)

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer over parameter groups, each with its `weight_decay`, its `lr_factor` and its parameters' `in_block`.

        Its state must be tensors by parameter: that is what checkpoints hold.
        """

    def plain(self, state: Tensor) -> Tensor:
        """A tensor of the optimizer's state as checkpoints hold it; `step` must take what a checkpoint gives back."""
        return state

    def _groups(self, parameters: Iterable[tuple[str, nn.Parameter]], places: Mapping[str, Place]) -> list[dict[str, Any]]:
        """Matrices decayed and the rest not, apart by learning rate and by whether they stand in a block."""
        grouped: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                place = places.get(name, Place())
                from_output = 0 if self.layer_decay is None else place.from_output
                grouped.setdefault((parameter.ndim < 2, from_output, place.in_block), []).append(parameter)
        return [
            {
                "params": grouped[key],
                "weight_decay": 0.0 if key[0] else self.weight_decay,
                "lr_factor": (self.layer_decay or 1.0) ** key[1],
                "in_block": key[2],
            }
            for key in sorted(grouped)
        ]


__all__ = ["Optimizer", "Place", "Schedule"]
