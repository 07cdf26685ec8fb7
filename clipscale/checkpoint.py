"""Checkpoints: folders that are whole or not there.

```text
checkpoints/step-00000300/
  model.safetensors       weights, by parameter name
  optimizer.safetensors   optimizer state, as `parameter name/field`
  average.safetensors     the weights' moving average, when one is kept
  state.json              step, seed, ranks, bad samples so far, and where each pair kind stands in its data (data/position.py)
  config.yaml             the run's resolved settings
  manifest.json           bytes and sha256 of every file above
```
A checkpoint is written beside its final name, fsynced, and renamed when whole; the newest one is found by looking and
checking sums, not by a pointer that can lie. Nothing is unpickled. The random state needs no file: every step seeds its
generators from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipscale.errors import CheckpointError, RequestError

_NAME = re.compile(r"^step-(\d{8})$")
_TENSOR_FILES = ("model", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """`model`, `optimizer` and, when one is kept, `average`; flat."""
    state: dict[str, Any]
    """What state.json holds."""
    sha256: str
    """Of manifest.json, and so of everything in the checkpoint."""

    def averaged(self) -> dict[str, Tensor]:
        """The weights, those that train as their moving average.

        Raises:
            RequestError: the run kept none.
        """
        if "average" not in self.tensors:
            raise RequestError(f"{self.folder} holds no average of the weights; train with optimizer.average_decay, 0.9999 say")
        return {**self.tensors["model"], **self.tensors["average"]}


def save(folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str) -> Path:
    """Write a checkpoint into `folder` (a run's checkpoints/); returns its path once it is whole on disk.

    Raises:
        CheckpointError: it could not be written, for want of space say; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, values in tensors.items():
            safetensors.torch.save_file(
                {key: value.detach().cpu().contiguous() for key, value in values.items()}, aside / f"{name}.safetensors"
            )
        (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        (aside / "config.yaml").write_text(config)
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{final}: could not be written: {error}; earlier checkpoints are untouched") from error
    return final


def remove_old(folder: Path, *, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, and leftovers of saves that were killed."""
    for path in list_checkpoints(folder)[keep_last:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; not yet checked."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.match(path.name)), reverse=True)


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose sums are right, and what was wrong with each newer one."""
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        problem = verify(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path}: {problem}")
    return None, damaged


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            file = path / Path(name).name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is damaged: its sha256 is not the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"not a whole checkpoint ({type(error).__name__}: {error})"
    missing = {f"{name}.safetensors" for name in _TENSOR_FILES} | {"state.json", "config.yaml"} - set(manifest)
    missing -= set(manifest)
    return f"the manifest does not list {', '.join(sorted(missing))}" if missing else None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking its sums.

    Raises:
        CheckpointError: it is missing, partial or damaged; names the file.
    """
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    tensors = {file.stem: safetensors.torch.load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(folder=path, step=state["step"], tensors=tensors, state=state, sha256=_sha256(path / "manifest.json"))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model whose names and shapes must be the same.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    check_fit(model.state_dict(), weights)
    model.load_state_dict(dict(weights))


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names and shapes are not a model's own.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)} in the checkpoint and {list(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the checkpoint does not fit the model: {shown}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
