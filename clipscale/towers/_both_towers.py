"""BothTowers: the two halves of a model that others trained, with its temperature."""

from __future__ import annotations

from dataclasses import dataclass

from clipscale.inputs import Modality
from clipscale.towers._module import TowerModule


@dataclass(frozen=True)
class BothTowers:
    """Two towers whose features already lie in one space."""

    modules: dict[Modality, TowerModule]
    """The medium's tower and the text's; what each wants to be fed comes from the checkpoint's own configuration."""
    embed_dim: int
    """Width of that space."""
    scale: float
    """The logit scale, not its logarithm."""
    bias: float | None = None
    """The logit bias of models trained with a sigmoid loss."""
