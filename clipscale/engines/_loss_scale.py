"""Loss scaling: fp16 gradients are made large enough to be numbers, and steps whose gradients overflow are left out.

Micikevicius et al. 2018, arXiv:1710.03740. torch's GradScaler looks for infinities on each rank alone; here the global norm, which is the
same on all ranks under every engine, decides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KEY = "loss_scale"
"""Under which a checkpoint's optimizer file holds the scale; no parameter has this name."""


class LossScale:
    """A power of two: halved when gradients overflow, doubled after a while without."""

    def __init__(self, *, start: float = 2.0**16, patience: int = 2000) -> None:
        """
        Args:
            patience: steps without overflow before it is doubled.
        """
        self.value = start
        self._patience = patience
        self._good_steps = 0

    def overflowed(self) -> bool:
        """Halve it; false when it is 1 already, so that the gradients themselves are no numbers."""
        self._good_steps = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True

    def went_well(self) -> None:
        """Count a step; perhaps double."""
        self._good_steps += 1
        if self._good_steps >= self._patience:
            self._good_steps = 0
            self.value *= 2

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"{KEY}/value": torch.tensor(self.value), f"{KEY}/good_steps": torch.tensor(self._good_steps)}

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave, if the checkpoint was made with one."""
        if f"{KEY}/value" in state:
            self.value = float(state[f"{KEY}/value"])
            self._good_steps = int(state[f"{KEY}/good_steps"])
