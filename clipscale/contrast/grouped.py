"""Grouped: the global batch cut into groups, each with negatives of its own alone; the loss is the mean of the groups'.

This is an approximation that some objectives ask for by name (M2-Encoder's, for comparison), never a way to compute another loss. Where
a group is several ranks, these alone speak with each other, on a grid of their own; where a rank holds several groups, nobody speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import Gradients, Result
from clipscale.errors import ConfigError, ContrastError
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

Compute = Callable[[Request, Agreement], Result]


def check_groups(objective: Objective, *, world: int) -> int:
    """Ranks of one group, at least 1.

    Raises:
        ConfigError: ranks and groups do not divide each other.
    """
    groups = objective.groups
    if world % groups and groups % world:
        raise ConfigError(f"{groups} groups of negatives do not fit {world} ranks: one number must divide the other")
    return max(1, world // groups)


def grouped_loss(request: Request, agreement: Agreement, compute: Compute) -> Result:
    """The mean over consecutive groups of the loss within each.

    Raises:
        ContrastError: on every rank alike, when a rank's pairs cannot be cut into its groups, or a group has none.
    """
    groups, world = request.objective.groups, request.mesh.world
    if groups <= world:
        ranks = world // groups
        mesh = request.mesh.part(groups)
        starts = range(0, world, ranks)
        inner = [agreement.part(slice(start, start + ranks)) for start in starts]
        _check_sizes([part.count for part in inner], 1)
        results = [compute(replace(request, mesh=mesh), inner[request.mesh.rank // ranks])]
    else:
        each = groups // world
        _check_sizes(agreement.sizes, each)
        size = len(request.pairs.x) // each
        alone = replace(agreement, sizes=[size])
        mesh = Mesh.single(request.mesh.device)
        cuts = [request.pairs.rows(slice(start, start + size)) for start in range(0, size * each, size)]
        results = [compute(replace(request, pairs=cut, mesh=mesh), alone) for cut in cuts]
    means = _mean_over_ranks(request, results)
    gradients = [result.gradients for result in results if result.gradients is not None]
    metrics = {name: means[1 + place].float() for place, name in enumerate(results[0].metrics)}
    return Result(means[0].to(request.dtype), metrics, _join(gradients, groups) if gradients else None)


def _check_sizes(sizes: list[int], parts: int) -> None:
    if any(size == 0 or size % parts for size in sizes):
        raise ContrastError(f"groups of negatives need pairs, as many in each: {parts} a rank do not divide batches of {sizes} pairs")


def _mean_over_ranks(request: Request, results: list[Result]) -> Tensor:
    """Loss and metrics, averaged over all groups; ranks of one group have the same."""
    own = torch.stack([torch.stack([number.to(torch.float64) for number in (result.loss, *result.metrics.values())]) for result in results])
    return request.mesh.gather(own.mean(0)).mean(0)


def _join(gradients: list[Gradients], groups: int) -> Gradients:
    """The groups' gradients, each a share of the mean; those of scale and bias added."""
    leaves = {name: torch.cat([part.leaves[name] for part in gradients]).div_(groups) for name in gradients[0].leaves}
    scale, bias = (torch.stack([getattr(part, name) for part in gradients]).sum(0) / groups for name in ("scale", "bias"))
    return Gradients(leaves, scale, bias)
