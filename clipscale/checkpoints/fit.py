"""Whether weights fit a model: the same names, the same shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clipscale.errors import CheckpointError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model whose names and shapes must be the same.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    check_fit(model.state_dict(), weights)
    model.load_state_dict(dict(weights))


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names and shapes are not a model's own.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)} in the checkpoint and {list(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the checkpoint does not fit the model: {shown}")
