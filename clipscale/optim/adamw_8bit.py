"""AdamW with moments in 8 bits: a quarter of their memory.

Dettmers et al. 2022, arXiv:2110.02861, by torchao: moments are codes of a nonlinear table, scaled in blocks of 256 numbers. Tensors of
fewer than 4,096 numbers, or of a number that is no multiple of 256, keep theirs in fp32. The step on each shape is compiled when first
taken. Checkpoints hold plain numbers, which any number of ranks can cut; coding them again rounds them once more, so a resumed run is the
uninterrupted one to that rounding, not bit for bit.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipscale.errors import MissingPackage
from clipscale.optim import Optimizer
from clipscale.parallel.parts import own_part

_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class AdamW8bit(Optimizer):
    """torchao's 8-bit AdamW; needs `clipscale[lowbit]`."""

    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False)
    """Of the first and second moment's moving averages."""
    eps: float = Field(default=1e-6, gt=0)

    def check(self) -> None:
        """torchao must be there."""
        if importlib.util.find_spec("torchao") is None:
            raise MissingPackage("optimizer 'adamw_8bit' needs the package: pip install --constraint constraints.txt 'clipscale[lowbit]'")

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:  # noqa: ARG002
        """Two moments a parameter."""
        return _Coded(groups, self)

    def plain(self, state: Tensor) -> Tensor:
        """Codes as the numbers they stand for."""
        if not _is_coded(state):
            return state
        numbers: Tensor = own_part(state).dequantize()
        if not isinstance(state, DTensor):
            return numbers
        return DTensor.from_local(numbers, state.device_mesh, state.placements, run_check=False, shape=state.shape, stride=state.stride())


class _Coded(torch.optim.Optimizer):
    """torchao's optimizer with this project's learning rates, and with moments as checkpoints give them."""

    def __init__(self, groups: list[dict[str, Any]], settings: AdamW8bit) -> None:
        from torchao.optim import AdamW8bit as Torchao

        super().__init__(groups, {"lr": settings.lr})
        self._inner = Torchao(self.param_groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self._inner.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step by the groups as they are now: engines may have split them."""
        assert closure is None
        shared = {key: value for key, value in self._inner.defaults.items() if key != "lr"}
        self._inner.param_groups = [{**shared, **group, "lr": torch.tensor(float(group["lr"]))} for group in self.param_groups]
        for group in self.param_groups:
            for parameter in group["params"]:
                self._code(parameter)
        self._inner.step()

    def _code(self, parameter: nn.Parameter) -> None:
        """Moments that came as plain numbers, from a checkpoint, in 8 bits again."""
        state = self.state.get(parameter, {})
        for name, signed in _SIGNED.items():
            if name in state and not _is_coded(state[name]):
                coded = self._inner._new_buffer(parameter, signed)
                own_part(coded).copy_(own_part(state[name]))
                state[name] = coded


def _is_coded(tensor: Tensor) -> bool:
    return hasattr(own_part(tensor), "codes")
