"""Replicas: copies of the weights on several ranks must be the same bits; memory or a processor that errs makes them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from clipscale.errors import ReplicasDiffer
from clipscale.parallel.mesh import Mesh
from clipscale.parallel.parts import own_part

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number."""


def check_replicas(parameters: Iterable[tuple[str, Tensor]], mesh: Mesh, *, step: int) -> None:
    """Compare copies; every rank of the mesh holds one. 8 bytes a parameter travel.

    A copy's sum, its bits taken as integers modulo 2⁶⁴, differs whenever a single bit does.

    Raises:
        ReplicasDiffer: on every rank alike; names the parameters, and the ranks where most others disagree with them.
    """
    names, tensors = zip(*parameters, strict=True)
    sums = mesh.gather(torch.stack([_sum_of_bits(own_part(tensor.detach())) for tensor in tensors])).cpu()
    differing = (sums != sums[0]).any(0).nonzero()[:, 0].tolist()
    if differing:
        told = "; ".join(f"{names[place]} {_who(sums[:, place].tolist())}" for place in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ReplicasDiffer(
            f"step {step}: copies of the weights are no longer the same: {told}{more}. A memory or a processor erred; the last "
            "checkpoint is from before: take the machine of that rank out, and run the same command again"
        )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def _who(sums: list[int]) -> str:
    """Ranks whose copy is not most ranks' copy; of two that differ nobody knows which is right."""
    (usual, count), *_ = Counter(sums).most_common()
    if count <= len(sums) / 2:
        return f"differs among ranks 0 to {len(sums) - 1}, and no copy is most ranks'"
    return "differs on rank " + ", ".join(str(rank) for rank, own in enumerate(sums) if own != usual)
