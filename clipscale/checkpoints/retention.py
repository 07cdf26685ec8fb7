"""Retention: which checkpoints are kept, and what is removed; here and in the store."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from clipscale.checkpoints.reading import list_checkpoints, step_of
from clipscale.checkpoints.settings import Checkpoints
from clipscale.checkpoints.writing import remove


def kept(losses: Mapping[int, float], settings: Checkpoints, *, newest: int) -> set[int]:
    """The steps to keep of those that there are.

    Args:
        losses: of every step that has a checkpoint.
        newest: the step that has just been saved. What lies beyond it is damaged or of a course that was given up: it takes nobody's place,
            and is written over when the run gets there.
    """
    past = sorted((step for step in losses if step <= newest), reverse=True)
    best = sorted((step for step in past if not math.isnan(losses[step])), key=lambda step: (losses[step], -step))
    for_good = {step for step in past if settings.keep_every and step % settings.keep_every == 0}
    return {*past[: settings.keep_last], *best[: settings.keep_best], *for_good, *(step for step in losses if step > newest)}


def remove_others(folder: Path, settings: Checkpoints, *, newest: int) -> None:
    """Remove the checkpoints that are not kept, and leftovers of saves and removals that were killed.

    Raises:
        OSError: one cannot be removed.
    """
    there = {step: path for path in list_checkpoints(folder) if (step := step_of(path.name)) is not None}
    losses = {step: loss_of(path / "state.json") for step, path in there.items()}
    for step in there.keys() - kept(losses, settings, newest=newest):
        remove(there[step])
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def loss_of(state: Path | bytes) -> float:
    """What a checkpoint's state.json says of its steps' loss; nan when it says nothing."""
    try:
        return float(json.loads(state if isinstance(state, bytes) else state.read_bytes())["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


def bytes_of(folder: Path) -> int:
    """What the checkpoints in a folder take."""
    return sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
