"""Pairs of a global batch, and the ranks' agreement about them before anything is computed.

What could make ranks wait for each other for ever, or silently compute different losses, is compared in one small gather; whatever is
wrong is then raised on every rank, with the ranks and values it was found on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clipscale.contrast.layout import numbers_of
from clipscale.contrast.settings import ContrastSettings
from clipscale.errors import ContrastError, NonFiniteFeatures
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh

FACTS = 6
"""Whole numbers that every rank tells all others before anything is computed."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_UNUSABLE, _VALUES = 1, 2
"""What a rank tells of a problem: it is of any kind, or only of values that are not finite."""

# b pairs on this rank, B in the global batch, D embedding width, Dg guide width, M extra samples on this rank, W ranks.


@dataclass(frozen=True)
class Pairs:
    """This rank's b pairs: row i of everything but extras belongs to pair i. b may differ between ranks, and be 0 on some."""

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
    views: Mapping[str, Tensor] = field(default_factory=dict)
    """Embeddings of further modalities or views, by the names an objective asks for: [b, D] each."""
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers of each pair, by the names an objective asks for, floating or int64: [b] each; gradients flow to floating ones."""
    extra_x: Tensor | None = None
    """This rank's share of extra first-modality samples, negatives of every y of the global batch: [M, D], M its own on every rank."""
    extra_y: Tensor | None = None
    """This rank's share of extra second-modality samples, negatives of every x: hard-negative captions, a queue: [M, D]."""

    def guide(self, objective: Objective) -> Tensor | None:
        """The guide features this objective needs, if any."""
        if "guide" in objective.needs:
            return self.guide_y
        return self.guide_x if "first_guide" in objective.needs else None

    def features(self, objective: Objective) -> dict[str, Tensor]:
        """Embeddings of the pairs, by view."""
        every = {"x": self.x, "y": self.y, **self.views}
        return {view: every[view] for view in objective.views}

    def extras(self) -> dict[str, Tensor]:
        """Extra samples, by name."""
        named = {"extra_x": self.extra_x, "extra_y": self.extra_y}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def leaves(self, objective: Objective) -> dict[str, Tensor]:
        """Everything a gradient may flow to, by name."""
        known = {name: self.numbers[name] for name in numbers_of(objective) if name in self.numbers}
        numbers = {name: number for name, number in known.items() if number.is_floating_point()}
        return {**self.features(objective), **self.extras(), **numbers}

    def rounded(self, dtype: torch.dtype) -> Pairs:
        """The same pairs with embeddings of this dtype."""
        views = {name: view.to(dtype) for name, view in self.views.items()}
        extra_x, extra_y = (None if extra is None else extra.to(dtype) for extra in (self.extra_x, self.extra_y))
        return replace(self, x=self.x.to(dtype), y=self.y.to(dtype), views=views, extra_x=extra_x, extra_y=extra_y)

    def rows(self, rows: slice) -> Pairs:
        """Some of the pairs, without extras."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        views, numbers = ({name: tensor[rows] for name, tensor in group.items()} for group in (self.views, self.numbers))
        return Pairs(self.x[rows], self.y[rows], cut(self.guide_x), cut(self.guide_y), cut(self.ids), views, numbers)


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
    wanted: frozenset[str]
    """Names of leaves, or "scale" or "bias", to which this rank wants gradients."""

    @property
    def dtype(self) -> torch.dtype:
        """What statistics, gradients and the loss are computed in."""
        return torch.float64 if self.pairs.x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after they have agreed."""

    sizes: list[int]
    """b of every rank."""
    extras: dict[str, list[int]]
    """By name, how many extra samples every rank brings."""
    wanted: frozenset[str]
    """Leaves to which any rank wants gradients; then all take part in computing them."""

    @property
    def count(self) -> int:
        """B, pairs in the global batch."""
        return sum(self.sizes)

    def part(self, ranks: slice) -> Agreement:
        """What a group of consecutive ranks knows, when it is a global batch of its own."""
        return replace(self, sizes=self.sizes[ranks], extras={name: sizes[ranks] for name, sizes in self.extras.items()})


def agree(request: Request) -> Agreement:
    """Compare this call with all other ranks' and learn their batch sizes.

    Raises:
        ContrastError: on every rank alike, when any rank's input is unusable or the ranks disagree; NonFiniteFeatures, when all that is
            wrong is values that are not finite.
    """
    only_values = False
    try:
        problem = find_problem(request)
        if problem is None:
            problem, only_values = _finite_problem(request), True
    except Exception as error:  # whatever it is, the other ranks must hear of it: they are about to wait for this one
        problem = f"{type(error).__name__}: {error}"
    facts = {} if problem else _facts(request)
    names = _names(request) if not problem else []
    own = [
        _fingerprint(facts),
        0 if not problem else _VALUES if only_values else _UNUSABLE,
        *_counts(request, problem),
        sum(1 << names.index(name) for name in request.wanted if name in names),
    ]
    table = request.mesh.gather(torch.tensor(own, dtype=torch.int64, device=request.mesh.device)).tolist()
    if any(row[1] for row in table) or len({row[0] for row in table}) > 1:
        only = {row[1] for row in table} <= {0, _VALUES}
        _raise_together(request, problem, facts, error=NonFiniteFeatures if only else ContrastError)
    columns = [list(column) for column in zip(*table, strict=True)]
    wanted = frozenset(name for place, name in enumerate(names) if any(row[5] >> place & 1 for row in table))
    extras = {name: columns[place] for place, name in ((3, "extra_x"), (4, "extra_y")) if name in request.pairs.extras()}
    agreement = Agreement(columns[2], extras, wanted)
    if agreement.count == 0:
        raise ContrastError(f"the global batch is empty: none of {len(table)} ranks has a pair; a contrastive loss needs at least one")
    return agreement


def _names(request: Request) -> list[str]:
    return [*request.pairs.leaves(request.objective), "scale", "bias"]


def _counts(request: Request, problem: str | None) -> list[int]:
    if problem:
        return [0, 0, 0]
    tensors = (request.pairs.x, request.pairs.extra_x, request.pairs.extra_y)
    return [0 if tensor is None else len(tensor) for tensor in tensors]


def _facts(request: Request) -> dict[str, Any]:
    """What must be the same on all ranks; a key is how an error calls it."""
    pairs, scale, bias = request.pairs, request.scale, request.bias
    guide = pairs.guide(request.objective)
    return {
        "width": pairs.x.shape[1],
        "guide width": 0 if guide is None else guide.shape[1],
        "dtype": str(pairs.x.dtype),
        "caption ids": pairs.ids is not None,
        "views and extras": [*pairs.views, *pairs.extras()],
        "numbers": [f"{name} {pairs.numbers[name].dtype}" for name in request.objective.numbers],
        "scale": float(scale.detach()),
        "bias": 0.0 if bias is None else float(bias.detach()),
        "objective": [request.objective.model_dump_json(), type(request.objective).__name__],
        "contrast settings": request.settings.model_dump_json(),
    }


def _fingerprint(facts: Mapping[str, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest(), "big") >> 1


def _raise_together(request: Request, problem: str | None, facts: Mapping[str, Any], *, error: type[ContrastError]) -> None:
    """Tell on every rank what any rank met, or what the ranks disagree about."""
    met = request.mesh.gather_objects([problem, facts])
    told = [(rank, text) for rank, (text, _) in enumerate(met) if text]
    if told:
        raise error("; ".join(f"rank {rank} of {len(met)}: {text}" for rank, text in told))
    for name in met[0][1]:
        values = [fact[name] for _, fact in met]
        if any(value != values[0] for value in values):
            each = ", ".join(f"rank {rank}: {_shown(value)}" for rank, value in enumerate(values))
            raise ContrastError(f"ranks disagree about the {name}: {each}; all ranks must contrast the same kind of pairs")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def find_problem(request: Request) -> str | None:
    """What is wrong with this rank's input besides values that are not finite, or None."""
    pairs, objective = request.pairs, request.objective
    problems = (_unmet_problem(part, pairs, request.bias) for part in objective.parts)
    return (
        next((problem for problem in problems if problem is not None), None)
        or _shape_problem(pairs)
        or _number_problem("scale", request.scale, positive=True)
        or (_number_problem("bias", request.bias) if request.bias is not None else None)
        or _device_problem(request)
    )


def _unmet_problem(objective: Objective, pairs: Pairs, bias: Tensor | None) -> str | None:
    name = type(objective).__name__
    wanted = {"guide": pairs.guide_y, "first_guide": pairs.guide_x, "ids": pairs.ids, "bias": bias}
    for need in sorted(objective.needs):
        if wanted[need] is None:
            return f"objective {name} needs {_NAMES[need]}, none was given"
    for view in objective.views:
        if view not in {"x", "y", *pairs.views}:
            return f"objective {name} needs embeddings of a view '{view}'; there are {', '.join(['x', 'y', *pairs.views])}"
    for number in objective.numbers:
        if number not in pairs.numbers:
            return f"objective {name} needs a number '{number}' of every pair; there are {', '.join(pairs.numbers) or 'none'}"
    if pairs.extras() and not objective.takes_extras:
        return f"objective {name} takes no extra samples, {' and '.join(pairs.extras())} was given"
    return None


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
    for name, view in pairs.views.items():
        if view.shape != x.shape or view.dtype != x.dtype:
            return f"view '{name}' is {view.dtype} {list(view.shape)}; it must be {x.dtype} {list(x.shape)} as x is"
    for name, extra in pairs.extras().items():
        if extra.ndim != 2 or extra.shape[1] != x.shape[1] or extra.dtype != x.dtype:
            return f"{name} is {extra.dtype} {list(extra.shape)}; it must be {x.dtype} [samples, {x.shape[1]}], as wide as x"
    for name, guide in (("guide_x", pairs.guide_x), ("guide_y", pairs.guide_y)):
        if guide is not None and (guide.ndim != 2 or len(guide) != len(x)):
            return f"{name} {list(guide.shape)} must be features [pairs, width] of the same {len(x)} pairs as x"
    for name, number in pairs.numbers.items():
        if number.shape != x.shape[:1] or not (number.dtype in DTYPES or number.dtype == torch.int64):
            return f"number '{name}' is {number.dtype} {list(number.shape)}; it must be floating or int64 [{len(x)}], one for each pair"
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


def _tensors(request: Request) -> dict[str, Tensor | None]:
    pairs = request.pairs
    return {"x": pairs.x, "y": pairs.y, **pairs.views, **pairs.extras(), "guide": pairs.guide(request.objective), **pairs.numbers}


def _device_problem(request: Request) -> str | None:
    every = {**_tensors(request), "ids": request.pairs.ids, "scale": request.scale, "bias": request.bias}
    for name, tensor in every.items():
        if tensor is not None and tensor.device != request.mesh.device:
            return f"{name} is on {tensor.device}, this rank's device is {request.mesh.device}"
    return None


def _finite_problem(request: Request) -> str | None:
    for name, tensor in _tensors(request).items():
        if tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all()):
            continue
        bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[:, 0].tolist()
        return f"{name} is not finite in {len(bad)} of {len(tensor)} rows, first in row {bad[0]}"
    return None
