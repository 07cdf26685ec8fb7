"""Muon: momentum of the blocks' matrices, made orthogonal; AdamW for everything else.

Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled to AdamW's steps as Liu et al. 2025, arXiv:2502.16982, so that one learning
rate serves both. Embeddings, convolutions, projections, norms, biases and temperatures are AdamW's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from clipscale.optim import Optimizer


class Muon(Optimizer):
    """torch's Muon beside torch's AdamW."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of Muon's part."""
    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False)
    """Of AdamW's part."""
    eps: float = Field(default=1e-6, gt=0)
    """Of AdamW's part."""

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """One momentum for a matrix inside a block, two moments for the rest."""
        return _MuonAndAdamW(groups, self, fused=fused)


class _MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that share parameter groups and state."""

    def __init__(self, groups: list[dict[str, Any]], settings: Muon, *, fused: bool) -> None:
        apart = [part for group in groups for part in _apart(group)]
        super().__init__(apart, {"lr": settings.lr, "fused": fused})
        shown = [{**group, "params": list(group["params"])} for group in self.param_groups]
        adamw = [group for group in shown if not group["orthogonal"]]
        muon = [group for group in shown if group["orthogonal"]]
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        if adamw:
            made = torch.optim.AdamW(adamw, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
            self._parts.append((False, made))
        if muon:
            options = {"momentum": settings.momentum, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append((True, torch.optim.Muon(muon, lr=settings.lr, **options)))  # type: ignore[arg-type]
        for _, part in self._parts:
            part.state = self.state
        self.param_groups[:] = [group for _, part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both, on the groups as they are now: engines may have split them."""
        assert closure is None
        for orthogonal, part in self._parts:
            part.param_groups = [group for group in self.param_groups if group["orthogonal"] == orthogonal]
            part.step()


def _apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group's matrices inside blocks, and the others."""
    matrices = [parameter for parameter in group["params"] if group["in_block"] and parameter.ndim == 2]
    others = [parameter for parameter in group["params"] if not group["in_block"] or parameter.ndim != 2]
    return [{**group, "params": part, "orthogonal": part is matrices} for part in (matrices, others) if part]
