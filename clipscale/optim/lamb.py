"""LAMB: Adam whose step on each tensor is as long as the tensor itself, for very large batches.

You et al. 2020, arXiv:1904.00962; timm's implementation.
"""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from pydantic import Field

from clipscale.optim import Optimizer


class Lamb(Optimizer):
    """timm's LAMB."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Applied to matrices only; tensors without it take plain Adam steps."""
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    """Of the first and second moment's moving averages."""
    eps: float = Field(default=1e-6, gt=0)

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:  # noqa: ARG002
        """Two moments a parameter; gradients are clipped by the engine, not once more in here."""
        return _Lamb(groups, lr=self.lr, betas=self.betas, eps=self.eps, max_grad_norm=None)


class _Lamb(timm.optim.Lamb):  # type: ignore[misc]
    """timm counts steps by parameter group; checkpoints hold what belongs to a parameter, so each keeps the count."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            counts = [float(self.state[parameter]["step"]) for parameter in group["params"] if "step" in self.state.get(parameter, {})]
            group["step"] = torch.tensor(max(counts, default=0.0))
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] = group["step"].clone()
