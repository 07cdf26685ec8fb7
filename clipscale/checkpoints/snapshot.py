"""Snapshot: a copy of a training state as it was at one step, in memory that is used again for the next.

The copy is what training waits for. It is made into one block of the CPU's memory that is asked for, and touched page by page, before the
first save needs it: fresh pages take ten times as long as the copy itself (benchmarks/README.md). The block is as large as one checkpoint's
tensors, each begun on a multiple of 64 bytes; it grows when a state does not fit. Beside GPUs it is pinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from clipscale.errors import CheckpointError

_ALIGN = 64
Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file, then by name."""


def expected_bytes(model: nn.Module, *, averaged: bool) -> int:
    """A training state's size in a snapshot: weights, two moments (and the average) and a count of steps for all that trains, in fp32."""
    fields = 4 if averaged else 3
    sizes = [(-(-parameter.numel() * 4 // _ALIGN) * _ALIGN, parameter.requires_grad) for parameter in model.parameters()]
    return sum(size * fields + _ALIGN if trains else size for size, trains in sizes) + sum(_room_for(buffer) for buffer in model.buffers())


class Snapshot:
    """One copy at a time: taking the next one writes over it."""

    def __init__(self, expected_bytes: int, *, pinned: bool) -> None:
        """Begins to make room for so many bytes, in a thread."""
        self._pinned = pinned
        with_room = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._room: Future[Tensor] = with_room.submit(self._make_room, expected_bytes)
        with_room.shutdown(wait=False)

    @property
    def bytes(self) -> int:
        """What is held."""
        return self._room.result().numel()

    def take(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """A copy of the tensors on the CPU; theirs may change once this returns, and the copy lasts until the next call.

        Raises:
            CheckpointError: there is no memory for it.
        """
        room = self._room_of(sum(_room_for(tensor) for file in tensors.values() for tensor in file.values()))
        copies: dict[str, dict[str, Tensor]] = {}
        offset = 0
        for file, named in tensors.items():
            copies[file] = {}
            for name, tensor in named.items():
                place = room[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
                copies[file][name] = place.copy_(tensor.detach(), non_blocking=self._pinned)
                offset += _room_for(tensor)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def _room_of(self, need: int) -> Tensor:
        try:
            if self._room.result().numel() < need:
                self._room = Future()  # lets go of the old block first
                self._room.set_result(self._make_room(need))
            return self._room.result()
        except (MemoryError, RuntimeError) as error:
            raise CheckpointError(f"there is no memory for the copy that is saved, {need / 1e6:,.0f} MB on rank 0: {error}") from error

    def _make_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).zero_()


def _room_for(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGN) * _ALIGN
