"""The exact peak of tensors alive at once on the CPU: every storage that torch's operators make, counted until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        known = {_place(given) for given in tree_leaves([args, kwargs]) if isinstance(given, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and _place(tensor) not in known | self.alive:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self.alive.add(place)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.alive.discard(place)
        self.bytes -= size


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(work: Callable[[], Any]) -> int:
    """The largest number of bytes of tensors made inside `work` that were alive at the same time."""
    with _Counting() as counting:
        work()
    return counting.peak


def kept_bytes(work: Callable[[], Any]) -> int:
    """Bytes of tensors made inside `work` that are alive as long as its result is."""
    with _Counting() as counting:
        result = work()
        kept = counting.bytes
    del result
    return kept
