"""Pairs of a global batch, and the ranks' agreement about them before anything is computed.

What could make ranks wait for each other for ever, or silently compute different losses, is compared in one small gather; whatever is
wrong is then raised on every rank, with the ranks and values it was found on.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from clipscale.contrast.settings import ContrastSettings
from clipscale.errors import ContrastError
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# b pairs on this rank, B in the global batch, D embedding width, Dg guide width, W ranks.


@dataclass(frozen=True)
class Pairs:
    """This rank's b pairs: row i of everything belongs to pair i. b may differ between ranks, and be 0 on some."""

    x: Tensor
    """Embeddings of the first modality, normalised: [b, D]."""
    y: Tensor
    """Embeddings of the second modality, normalised: [b, D]."""
    guide_x: Tensor | None = None
    """Features of the first modality's locked tower, for objectives that need a "first_guide": [b, Dg]; no gradient flows to them."""
    guide_y: Tensor | None = None
    """Features of the second modality's locked tower, for objectives that need a "guide": [b, Dg]; no gradient flows to them."""
    ids: Tensor | None = None
    """The caption's identity, equal for equal captions (a 63-bit hash): int64 [b]."""

    def guide(self, objective: Objective) -> Tensor | None:
        """The guide features this objective needs, if any."""
        if "guide" in objective.needs:
            return self.guide_y
        return self.guide_x if "first_guide" in objective.needs else None


@dataclass(frozen=True)
class Request:
    """One call for the loss, as this rank sees it."""

    objective: Objective
    pairs: Pairs
    scale: Tensor
    """The logits' scale, one positive number."""
    bias: Tensor | None
    """The logits' bias, one number; None when the objective has none."""
    settings: ContrastSettings
    mesh: Mesh
    wants_gradients: bool
    """Whether this rank will want gradients."""

    @property
    def dtype(self) -> torch.dtype:
        """What statistics, gradients and the loss are computed in."""
        return torch.float64 if self.pairs.x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after they have agreed."""

    sizes: list[int]
    """b of every rank."""
    wants_gradients: bool
    """Whether any rank wants gradients; then all take part in computing them."""

    @property
    def count(self) -> int:
        """B, pairs in the global batch."""
        return sum(self.sizes)


@dataclass(frozen=True)
class _Facts:
    """What ranks compare, as numbers; a field's name is how an error calls it."""

    problem: float
    pairs: float
    gradients: float
    width: float
    guide_width: float
    dtype: float
    caption_ids: float
    scale: float
    bias: float
    request: float


_MAY_DIFFER = {"problem", "pairs", "gradients"}


def agree(request: Request) -> Agreement:
    """Compare this call with all other ranks' and learn their batch sizes.

    Raises:
        ContrastError: on every rank alike, when any rank's input is unusable or the ranks disagree.
    """
    try:
        problem = find_problem(request)
    except Exception as error:  # whatever it is, the other ranks must hear of it: they are about to wait for this one
        problem = f"{type(error).__name__}: {error}"
    table = request.mesh.gather(_facts(request, problem).to(request.mesh.device)).tolist()
    ranks = [_Facts(*row) for row in table]
    if any(facts.problem for facts in ranks):
        told = [(rank, text) for rank, text in enumerate(request.mesh.gather_objects(problem)) if text]
        raise ContrastError("; ".join(f"rank {rank} of {len(ranks)}: {text}" for rank, text in told))
    for name in (field.name for field in fields(_Facts) if field.name not in _MAY_DIFFER):
        _compare(name, [getattr(facts, name) for facts in ranks])
    agreement = Agreement([int(facts.pairs) for facts in ranks], any(facts.gradients for facts in ranks))
    if agreement.count == 0:
        raise ContrastError(f"the global batch is empty: none of {len(ranks)} ranks has a pair; a contrastive loss needs at least one")
    return agreement


def _compare(name: str, values: list[float]) -> None:
    if len(set(values)) == 1:
        return
    word = name.replace("_", " ")
    shown = [str(DTYPES[int(value)]) if name == "dtype" else f"{value:g}" for value in values]
    if name == "request":
        word, shown = "objective or contrast settings", [f"fingerprint {int(value):08x}" for value in values]
    each = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(shown))
    raise ContrastError(f"ranks disagree about the {word}: {each}; all ranks must contrast the same kind of pairs")


def _facts(request: Request, problem: str | None) -> Tensor:
    pairs, scale, bias = request.pairs, request.scale, request.bias
    if problem is not None:
        return torch.tensor([1.0] + [0.0] * (len(fields(_Facts)) - 1), dtype=torch.float64)
    guide = pairs.guide(request.objective)
    fingerprint = zlib.crc32((request.objective.model_dump_json() + request.settings.model_dump_json()).encode())
    facts = _Facts(
        problem=0,
        pairs=len(pairs.x),
        gradients=request.wants_gradients,
        width=pairs.x.shape[1],
        guide_width=0 if guide is None else guide.shape[1],
        dtype=DTYPES.index(pairs.x.dtype),
        caption_ids=pairs.ids is not None,
        scale=float(scale.detach()),
        bias=0.0 if bias is None else float(bias.detach()),
        request=fingerprint,
    )
    return torch.tensor([float(getattr(facts, field.name)) for field in fields(_Facts)], dtype=torch.float64)


def find_problem(request: Request) -> str | None:
    """What is wrong with this rank's input, or None."""
    pairs, needs = request.pairs, request.objective.needs
    name = type(request.objective).__name__
    wanted = {"guide": pairs.guide_y, "first_guide": pairs.guide_x, "ids": pairs.ids, "bias": request.bias}
    for need in sorted(needs):
        if wanted[need] is None:
            return f"objective {name} needs {_NAMES[need]}, none was given"
    return (
        _shape_problem(pairs)
        or _number_problem("scale", request.scale, positive=True)
        or (_number_problem("bias", request.bias) if request.bias is not None else None)
        or _device_problem(request)
        or _finite_problem(request)
    )


_NAMES = {
    "guide": "guide features of the second modality (guide_y)",
    "first_guide": "guide features of the first modality (guide_x)",
    "ids": "caption ids",
    "bias": "a logit bias",
}


def _shape_problem(pairs: Pairs) -> str | None:
    x, y = pairs.x, pairs.y
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] == 0:
        return f"x {list(x.shape)} and y {list(y.shape)} must be embeddings [pairs, width] of equal shape"
    if x.dtype != y.dtype or x.dtype not in DTYPES:
        return f"x is {x.dtype} and y is {y.dtype}; both must be the same of {', '.join(map(str, DTYPES))}"
    for name, guide in (("guide_x", pairs.guide_x), ("guide_y", pairs.guide_y)):
        if guide is not None and (guide.ndim != 2 or len(guide) != len(x)):
            return f"{name} {list(guide.shape)} must be features [pairs, width] of the same {len(x)} pairs as x"
    if pairs.ids is not None and (pairs.ids.shape != x.shape[:1] or pairs.ids.dtype != torch.int64):
        return f"ids {pairs.ids.dtype} {list(pairs.ids.shape)} must be int64 [{len(x)}], one for each pair"
    return None


def _number_problem(name: str, value: Tensor, *, positive: bool = False) -> str | None:
    if value.numel() != 1:
        return f"{name} must be a single number, it has shape {list(value.shape)}"
    number = float(value.detach())
    if not math.isfinite(number) or (positive and number <= 0):
        return f"{name} is {number:g}; it must be a finite{' positive' if positive else ''} number"
    return None


def _device_problem(request: Request) -> str | None:
    pairs = request.pairs
    tensors = {"x": pairs.x, "y": pairs.y, "guide": pairs.guide(request.objective), "ids": pairs.ids, "scale": request.scale}
    for name, tensor in (tensors | {"bias": request.bias}).items():
        if tensor is not None and tensor.device != request.mesh.device:
            return f"{name} is on {tensor.device}, this rank's device is {request.mesh.device}"
    return None


def _finite_problem(request: Request) -> str | None:
    pairs = request.pairs
    for name, tensor in (("x", pairs.x), ("y", pairs.y), ("guide", pairs.guide(request.objective))):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor)).any(1).nonzero()[:, 0].tolist()
            return f"{name} is not finite in {len(bad)} of {len(tensor)} rows, first in row {bad[0]}"
    return None
