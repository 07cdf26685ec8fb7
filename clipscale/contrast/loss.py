"""The loss as trainers call it: agree, compute by the chosen method, and stand in the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipscale.contrast.choose import check_backend
from clipscale.contrast.dense import dense_loss
from clipscale.contrast.derived import Derived
from clipscale.contrast.grid import grid_loss
from clipscale.contrast.grouped import check_groups, grouped_loss
from clipscale.contrast.pairs import Pairs, Request, agree
from clipscale.contrast.result import Gradients, Result
from clipscale.contrast.settings import ContrastSettings, named_dtype
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


@dataclass(frozen=True)
class KnownGradients:
    """The loss of the global batch and this rank's part of its gradients: added over ranks, the gradients of exactly that number."""

    loss: Tensor
    metrics: dict[str, Tensor]
    leaves: Mapping[str, Tensor]
    """By name ("x", "y", further views, extras, numbers): float32 (float64 for float64 embeddings), in the shape of what they belong to."""
    scale: Tensor
    bias: Tensor | None
    """None when no bias was given."""


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
    tensors = _every_tensor(pairs, scale, bias)
    wanted = frozenset(name for name, tensor in tensors.items() if torch.is_grad_enabled() and tensor.requires_grad)
    result = _compute(Request(objective, pairs, scale, bias, settings, mesh, wanted))
    if result.gradients is None or not wanted:
        return ContrastOutput(result.loss, result.metrics)
    gradients = _as_named(result.gradients)
    result.gradients.leaves.clear()  # the only reference: each float32 gradient goes as soon as it is rounded
    names = [name for name in tensors if name in wanted]
    known = [_for_tensor(gradients.pop(name), tensors[name]) if name in gradients else torch.zeros_like(tensors[name]) for name in names]
    loss: Tensor = _Known.apply(result.loss, known, *(tensors[name] for name in names))  # type: ignore[no-untyped-call]
    return ContrastOutput(loss, result.metrics)


def contrastive_loss_and_gradients(
    objective: Objective, pairs: Pairs, scale: Tensor, bias: Tensor | None = None, *, settings: ContrastSettings, mesh: Mesh
) -> KnownGradients:
    """The same loss with its gradients in hand, outside autograd: what a trainer that caches gradients wants.

    Gradients are given for everything that can have one, whether or not it requires it; whole-numbered numbers have none.

    Raises:
        ConfigError: as `contrastive_loss`.
        ContrastError: as `contrastive_loss`.
    """
    tensors = _every_tensor(pairs, scale, bias)
    result = _compute(Request(objective, pairs, scale, bias, settings, mesh, frozenset(tensors)))
    assert result.gradients is not None
    named = _as_named(result.gradients)
    leaves = {name: gradient for name, gradient in named.items() if name not in {"scale", "bias"}}
    of_bias = None if bias is None else named["bias"].reshape(bias.shape)
    return KnownGradients(result.loss, result.metrics, leaves, named["scale"].reshape(scale.shape), of_bias)


def check_method(settings: ContrastSettings, *, world: int, objective: Objective | None = None) -> None:
    """Refuse a method or grid that does not fit `world` ranks, and an objective whose groups or terms do not.

    Raises:
        ConfigError: names the setting, the number of ranks and what fits.
    """
    if settings.method == "tiled" and world > 1:
        raise ConfigError(f"contrast method 'tiled' is for one rank, there are {world}; use 'auto', 'grid' (also tiled) or 'dense'")
    if objective is not None:
        check_backend(settings, objective)
    ranks = world if objective is None else check_groups(objective, world=world)
    rows = settings.grid_rows
    if rows is not None and ranks % rows:
        fitting = [str(count) for count in range(1, ranks + 1) if ranks % count == 0]
        raise ConfigError(f"grid_rows {rows} does not divide the {ranks} ranks; these do: {', '.join(fitting)}")


def _every_tensor(pairs: Pairs, scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Everything given that could have a gradient, by name."""
    numbers = {name: number for name, number in pairs.numbers.items() if number.is_floating_point()}
    named = {"x": pairs.x, "y": pairs.y, **pairs.views, **pairs.extras(), **numbers, "scale": scale}
    return named if bias is None else named | {"bias": bias}


def _compute(request: Request) -> Result:
    check_method(request.settings, world=request.mesh.world, objective=request.objective)
    with torch.no_grad(), torch.autocast(request.mesh.device.type, enabled=False):
        agreement = agree(request)
        rounded = named_dtype(request.settings.feature_dtype)
        if rounded is not None:
            request = replace(request, pairs=request.pairs.rounded(rounded))
        compute = dense_loss if request.settings.method == "dense" else grid_loss  # one rank is a 1×1 grid: tiles without a network
        derived = Derived(request, agreement)
        if request.objective.groups > 1:
            return derived.hand_back(grouped_loss(derived.request, derived.agreement, compute))
        return derived.hand_back(compute(derived.request, derived.agreement))


def _as_named(gradients: Gradients) -> dict[str, Tensor]:
    return {**gradients.leaves, "scale": gradients.scale, "bias": gradients.bias}


def _for_tensor(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.to(tensor.dtype).reshape(tensor.shape)


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already; the backward pass multiplies them with what arrives."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, known: list[Tensor], *_: Tensor) -> Tensor:
        ctx.known = known
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known is None:
            raise RuntimeError("the gradients of this loss were handed over already; say retain_graph=True in the first backward pass")
        known = ctx.known
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return None, None, *(tensor * gradient.to(tensor.dtype) for tensor in known)
        ctx.known = None  # handed over in place: no second copy of the largest tensors there are
        return None, None, *(tensor.mul_(gradient.to(tensor.dtype)) for tensor in known)
