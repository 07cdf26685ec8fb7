"""Ledger: what torch's operators hold and do, counted on tensors that have shapes and no memory.

Every storage that an operator makes is counted from its making until it is freed, so that the peak is exact. Every operator is one entry of
work: its products, two FLOPs for each multiplication, and the bytes it reads and writes; the roofline (timing.py) makes seconds of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_GATHERS = {"embedding", "index_select", "index", "gather"}
"""Operators that read as much as they write, whatever the size of what they read from."""
_PRODUCTS_OF_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu": 2, "_scaled_dot_product_flash_attention_for_cpu_backward": 5}
"""Matrix products of queries × keys × width; the backward pass makes the scores again."""


@dataclass
class Work:
    """Operators of one pass, in their order."""

    flops: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def add(self, flops: int, moved: int) -> None:
        """One more operator."""
        self.flops.append(flops)
        self.bytes.append(moved)

    def columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FLOPs and bytes of every operator."""
        return np.array(self.flops, dtype=np.float64), np.array(self.bytes, dtype=np.float64)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; to be entered after torch's FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}  # storage -> its number in the order of making
        self.bytes = self.peak = self.count = self._peak_count = 0
        self.sizes: dict[int, int] = {}
        self.work = Work()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        known = {_place(tensor) for tensor in given}
        new = [tensor for tensor in results if _place(tensor) not in known]
        for tensor in new:
            self._count(tensor)
        if new or function._schema.is_mutable:
            self.work.add(*_work_of(function.overloadpacket, args, kwargs or {}, made, given, results))
        return made

    def number_of(self, tensor: Tensor) -> int | None:
        """Of the storage behind a tensor, when it was made in here and is alive."""
        return self.alive.get(_place(tensor))

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if not size or place in self.alive:
            return
        self.count += 1
        self.alive[place], self.sizes[self.count] = self.count, size
        self.bytes += size
        if self.bytes > self.peak:
            self.peak, self._peak_count = self.bytes, self.count
        weakref.finalize(storage, self._freed, place, self.count, size)

    def _freed(self, place: int, number: int, size: int) -> None:
        if self.alive.get(place) == number:
            del self.alive[place]
            self.bytes -= size

    def made_before_peak(self, tensor: Tensor) -> int:
        """Bytes of a tensor's storage if it was made before the fullest moment, else 0; for what stays alive once it is made."""
        number = self.number_of(tensor)
        return self.sizes[number] if number is not None and number <= self._peak_count else 0


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _work_of(
    packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any, given: Sequence[Tensor], results: Sequence[Tensor]
) -> tuple[int, int]:
    written = sum(tensor.nbytes for tensor in results)
    name = packet.__name__
    read = written if name in _GATHERS else sum(_stored(tensor) for tensor in given)
    if name in _PRODUCTS_OF_ATTENTION:
        query, key = (given[0], given[1]) if name.endswith("cpu") else (given[1], given[2])
        return 2 * _PRODUCTS_OF_ATTENTION[name] * math.prod(query.shape) * key.shape[-2], read + written
    counted = flop_registry.get(packet)
    return (0 if counted is None else int(counted(*args, **kwargs, out_val=made))), read + written


def _stored(tensor: Tensor) -> int:
    """Bytes behind a tensor that is read: what is expanded is stored once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class NormsInFp32(torch.overrides.TorchFunctionMode):
    """What autocast does on CUDA and not on the CPU: layer and group norms are taken in fp32."""

    def __torch_function__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.nn.functional.layer_norm, torch.nn.functional.group_norm) and torch.is_autocast_enabled("cpu"):
            args = [args[0].float(), *args[1:]]
        return function(*args, **(kwargs or {}))
