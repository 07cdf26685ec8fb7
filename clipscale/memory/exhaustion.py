"""What to lower when memory runs out: by the phase of the step in which it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipscale.errors import OutOfMemory
from clipscale.phases import Phase, PhaseTimer

_OF_TOWERS = "micro_batch (now {rows} of {share} rows of a rank), or towers' activations by recompute; or cut weights by engine fsdp2"
_LOWER: dict[Phase, str] = {
    "data": "workers, or what the sources prefetch",
    "prepare": "micro_batch (now {rows} of {share} rows of a rank)",
    "encode": _OF_TOWERS,
    "contrast": "contrast.tile_rows, contrast.tile_columns and contrast.cache_bytes, or global_batch; or add ranks",
    "backward": _OF_TOWERS,
    "optimizer": "the optimizer's state: engine fsdp2 or deepspeed cuts it over ranks, optimizer adafactor keeps less",
    "communication": "contrast.tile_rows and contrast.tile_columns, or global_batch; or add ranks",
    "checkpoint": "the memory of others on the machine: rank 0 holds all weights and optimizer state while it writes",
    "other": "micro_batch (now {rows} of {share} rows of a rank)",
}


@contextmanager
def explaining(timer: PhaseTimer, *, step: int, rows: int | None, share: int) -> Iterator[None]:
    """Say in which phase memory ran out, and what to lower.

    Raises:
        OutOfMemory: instead of what torch's allocators raise.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        phase = timer.interrupted or "other"
        lower = _LOWER[phase].format(rows=share if rows is None else rows, share=share)
        asked = " ".join(str(error).split()).partition(" See documentation")[0][-200:]
        raise OutOfMemory(f"memory ran out at step {step}, in phase {phase}; lower {lower}. The allocator said: {asked}") from error


def _is_exhaustion(error: Exception) -> bool:
    """torch raises a plain RuntimeError on the CPU."""
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error) or "std::bad_alloc" in str(error)
    )
