"""Adafactor: second moments of a matrix kept as a row and a column, and steps relative to the weights' size.

Shazeer & Stern 2018, arXiv:1804.04235. BASIC (Pham et al. 2021, arXiv:2111.10050) trains with a variant that also keeps a first
moment; torch's, used here, keeps none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from clipscale.optim import Optimizer


class Adafactor(Optimizer):
    """torch's Adafactor: of a matrix it keeps rows + columns numbers instead of two copies."""

    needs_whole_weights: ClassVar[bool] = True  # torch 2.12: in-place squares of norms over parts are refused

    weight_decay: float = Field(default=0.0, ge=0)
    """Applied to matrices only."""
    beta2_decay: float = Field(default=-0.8, le=0)
    """Steps to this power are the second moment's weight of the new gradient."""
    eps: float = Field(default=1e-3, gt=0)
    """Least root mean square of the weights that a step is taken relative to."""
    clip_update: float = Field(default=1.0, gt=0)
    """Root mean square that an update of one tensor is scaled down to."""

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:  # noqa: ARG002
        """`lr` is relative: a step is lr × the root mean square of the weights, and never more than that × 1/√steps."""
        return torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, self.eps), d=self.clip_update)
