"""Activation recomputation: a block keeps its input and runs again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. Trades up to a third more arithmetic for the memory of what is inside the blocks. Which blocks, and
how much of them, can be chosen: attention alone (the selective recomputation of Korthikanti et al. 2022, arXiv:2205.05198, section 5),
every n-th block, or as many as a budget of memory asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from clipscale.errors import RequestError
from clipscale.settings import Settings

MIB = 2**20
Forward = Callable[..., Any]


class Recompute(Settings):
    """What a tower makes again in the backward pass instead of keeping it."""

    part: Literal["block", "attention"] = "block"
    """`block`: all that is inside a block; `attention`: its attention alone, which holds much memory for little arithmetic."""
    every: int = Field(default=1, gt=0)
    """Of the blocks, the first and every n-th after it."""
    keep_mb: int | None = Field(default=None, gt=0)
    """Keep the activations of as many blocks as fit in so many MiB, those of the last ones, and make the others' again. Counted for one
    pass of the tower, a micro-batch's; what a block holds is measured as it runs, so the first passes keep less. None: keep none."""


def recompute(blocks: Sequence[nn.Module], settings: Recompute) -> list[nn.Module]:
    """From now on these blocks keep no more activations for the backward pass than the settings say.

    Only `forward` is replaced: parameter names stay. Dropout draws the same numbers again.

    Returns:
        The modules whose `forward` was replaced.

    Raises:
        RequestError: a block has no attention to make again.
    """
    chosen = list(blocks[:: settings.every])
    parts = chosen if settings.part == "block" else [_attention(block) for block in chosen]
    if settings.keep_mb is not None:
        _Budget(parts, settings.keep_mb * MIB)
    else:
        for part in parts:
            part.forward = _recomputing(part.forward)
    return parts


def _attention(block: nn.Module) -> nn.Module:
    """The outermost module of a block that calls itself attention."""
    for module in block.modules():
        if module is not block and "attention" in type(module).__name__.lower():
            return module
    raise RequestError(f"recompute.part attention: this tower's blocks ({type(block).__name__}) have none; set part: block")


def _recomputing(forward: Forward) -> Forward:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return recomputed


class _Budget:
    """Keeps what fits: of the last parts first, which are needed first, so that nothing is made again beside them."""

    def __init__(self, parts: Sequence[nn.Module], budget: int) -> None:
        self._budget = budget
        self._held: list[float | None] = [None] * len(parts)  # bytes for each number of the first part's input, once known
        self._keeps: set[int] = set()
        self._numbers = 0
        for place, part in enumerate(parts):
            part.forward = self._choosing(place, part)

    def _choosing(self, place: int, part: nn.Module) -> Forward:
        whole, again = part.forward, _recomputing(part.forward)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return whole(*args, **kwargs)
            if place == 0:
                self._plan(sum(tensor.numel() for tensor in tree_leaves([args, kwargs]) if isinstance(tensor, Tensor)))
            if place not in self._keeps:
                return again(*args, **kwargs)
            if self._held[place] is not None:
                return whole(*args, **kwargs)
            counting = _Counting(part)
            with counting:
                result = whole(*args, **kwargs)
            self._held[place] = counting.bytes / max(self._numbers, 1)
            return result

        return chosen

    def _plan(self, numbers: int) -> None:
        """What this pass keeps, by what earlier passes measured; a part that was never kept counts as the largest of those that were."""
        self._numbers, self._keeps = numbers, set()
        known = [held for held in self._held if held is not None]
        room = float(self._budget)
        for place in reversed(range(len(self._held))):
            held = self._held[place]
            room -= numbers * (max(known, default=0.0) if held is None else held)
            if room < 0 or (not known and self._keeps):
                return
            self._keeps.add(place)


class _Counting(saved_tensors_hooks):
    """Counts the bytes that a part's forward pass saves for its backward pass, its weights left out."""

    def __init__(self, part: nn.Module) -> None:
        self.bytes = 0
        seen = {parameter.data_ptr() for parameter in part.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def undo(modules: Sequence[nn.Module]) -> None:
    """Their own `forward` again."""
    for module in modules:
        vars(module).pop("forward", None)
