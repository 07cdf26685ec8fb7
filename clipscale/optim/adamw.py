"""AdamW: Adam with weight decay beside the gradient.

Loshchilov & Hutter 2019, arXiv:1711.05101; the defaults are open_clip's for vision transformers. One fused kernel on GPUs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from clipscale.optim import Optimizer


class AdamW(Optimizer):
    """torch's AdamW."""

    adam_state: ClassVar[bool] = True

    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False)
    """Of the first and second moment's moving averages."""
    eps: float = Field(default=1e-6, gt=0)

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Two moments a parameter."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
