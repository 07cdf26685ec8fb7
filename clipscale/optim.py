"""Optimizers, parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from clipscale.settings import Settings


class Optimizer(Settings):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), with open_clip's defaults for vision transformers."""

    lr: float = Field(gt=0)
    """Learning rate at the top of the schedule."""
    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    """Applied to matrices only: not to biases, norms, temperatures and positions of fewer than two dimensions."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this global norm; none: never."""

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]], *, fused: bool) -> torch.optim.AdamW:
        """An optimizer over the trainable parameters, matrices decayed and the rest not."""
        trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


class Schedule(Settings):
    """The learning rate as a fraction of its top, a pure function of the step."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """It rises linearly over these first steps."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """What is left of it at the last step."""

    def fraction(self, step: int, *, steps: int) -> float:
        """The fraction at `step` of 1…`steps`."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * falling
