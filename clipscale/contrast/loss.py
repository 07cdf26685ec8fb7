"""The loss as trainers call it: agree, compute by the chosen method, and stand in the autograd graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipscale.contrast.dense import dense_loss
from clipscale.contrast.grid import grid_loss
from clipscale.contrast.pairs import Agreement, Pairs, Request, agree
from clipscale.contrast.result import Gradients, Result
from clipscale.contrast.settings import ContrastSettings
from clipscale.errors import ConfigError
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh


@dataclass(frozen=True)
class ContrastOutput:
    """The loss of the global batch."""

    loss: Tensor
    """The global mean loss, the same on every rank bit for bit: 0-d, float32 (float64 for float64 embeddings)."""
    metrics: dict[str, Tensor]
    """`x_to_y_top1`, `y_to_x_top1`, `mean_positive` and `hardest_negative` (cosines), the same on every rank, without gradient."""


def contrastive_loss(
    objective: Objective, pairs: Pairs, scale: Tensor, bias: Tensor | None = None, *, settings: ContrastSettings, mesh: Mesh
) -> ContrastOutput:
    """The exact mean loss over the pairs of all ranks, for any number of ranks, tile sizes and methods.

    Gradients: those of each rank's embeddings, scale and bias, *added over ranks*, are the gradient of the global mean loss. An engine
    that averages over W ranks must multiply the loss by W. They are computed here and not in the backward pass, so that no collective of
    the loss can mix with an engine's. Second derivatives do not exist.

    Args:
        objective: what is computed.
        pairs: this rank's pairs; their number may differ between ranks.
        scale: what cosines are multiplied with, one positive number (not its logarithm).
        bias: what is then added, one number; objectives that do not need it ignore it.
        settings: how it is computed.
        mesh: the ranks whose pairs make the global batch.

    Raises:
        ConfigError: on every rank alike, when the method or the grid does not fit the number of ranks.
        ContrastError: on every rank alike, when any rank's input is unusable or the ranks disagree.
    """
    check_method(settings, world=mesh.world)
    request = Request(objective, pairs, scale, bias, settings, mesh, _wants_gradients(pairs.x, pairs.y, scale, bias))
    with torch.no_grad(), torch.autocast(mesh.device.type, enabled=False):
        agreement = agree(request)
        result = _compute(request, agreement)
    if result.gradients is None or not request.wants_gradients:
        return ContrastOutput(result.loss, result.metrics)
    loss: Tensor = _KnownGradients.apply(result.loss, pairs.x, pairs.y, scale, bias, result.gradients)  # type: ignore[no-untyped-call]
    return ContrastOutput(loss, result.metrics)


def _wants_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def check_method(settings: ContrastSettings, *, world: int) -> None:
    """Refuse a method or grid that does not fit `world` ranks.

    Raises:
        ConfigError: names the setting, the number of ranks and what fits.
    """
    if settings.method == "tiled" and world > 1:
        raise ConfigError(f"contrast method 'tiled' is for one rank, there are {world}; use 'auto', 'grid' (also tiled) or 'dense'")
    rows = settings.grid_rows
    if rows is not None and world % rows:
        fitting = [str(count) for count in range(1, world + 1) if world % count == 0]
        raise ConfigError(f"grid_rows {rows} does not divide the {world} ranks; these do: {', '.join(fitting)}")


def _compute(request: Request, agreement: Agreement) -> Result:
    if request.settings.method == "dense":
        return dense_loss(request, agreement)
    return grid_loss(request, agreement, grid_rows=request.settings.grid_rows)  # one rank is a 1×1 grid: tiles without a network


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known already; the backward pass multiplies them with what arrives."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, gradients: Gradients) -> Tensor:
        ctx.save_for_backward(
            gradients.x.to(x.dtype),
            gradients.y.to(y.dtype),
            gradients.scale.to(scale.dtype).reshape(scale.shape),
            None if bias is None else gradients.bias.to(bias.dtype).reshape(bias.shape),
        )
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        known = [None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors]
        return None, *known, None
