"""TowerModule: what every tower's `build` returns."""

from __future__ import annotations

from torch import Tensor, nn

from clipscale.inputs import Input


class TowerModule(nn.Module):
    """An encoder from prepared inputs (clipscale/inputs.py) to one feature vector per sample."""

    embed_dim: int
    """Width of the features, before the model's projection into the shared space."""
    input: Input
    """What `forward` must be fed."""

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks from input to output: units of recomputation, sharding and unlocking."""
        raise NotImplementedError

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        """What stands after the last block (final norm, pooling, projection): unlocked together with the last blocks."""
        raise NotImplementedError

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prepared inputs of b samples to features [b, embed_dim], not normalised."""
        raise NotImplementedError
