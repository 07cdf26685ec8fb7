"""Reading checkpoints: those of a folder, whether one is whole, and what it holds. Damage is found before a tensor is looked at."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from clipscale.checkpoints.files import sha256
from clipscale.errors import CheckpointError, RequestError

_NAME = re.compile(r"step-(\d{8,})")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NEEDED = ("config.yaml", "model.safetensors", "optimizer.safetensors", "state.json")


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


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; not yet checked."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path.name)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


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
        manifest = read_manifest((path / "manifest.json").read_bytes())
        for name, expected in manifest.items():
            found = (path / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != expected["bytes"]:
                return f"{name} has {found.st_size} bytes, the manifest says {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} is damaged: its sha256 is not the manifest's"
        step = json.loads((path / "state.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not a whole checkpoint ({type(error).__name__}: {error})"
    unlisted = sorted(file.name for file in path.glob("*.safetensors") if file.name not in manifest)
    if unlisted:
        return f"the manifest does not list {', '.join(unlisted)}"
    named = step_of(path.name)
    return f"it is the checkpoint of step {step} under another's name" if named not in (None, step) else None


def read_manifest(text: bytes) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file of a checkpoint, by name.

    Raises:
        ValueError: it is damaged, lists too little, or names a file outside its folder.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"manifest.json is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json is damaged: it is no table of files")
    if missing := [name for name in _NEEDED if name not in manifest]:
        raise ValueError(f"manifest.json does not list {', '.join(missing)}")
    for name, entry in manifest.items():
        if not _PLAIN.fullmatch(name):
            raise ValueError(f"manifest.json names {name!r}, which is no file of this folder")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"manifest.json says neither bytes nor sha256 of {name}")
    return manifest


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking its sums.

    Raises:
        CheckpointError: it is missing, partial or damaged; names the file.
    """
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    tensors = {file.stem: _load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(folder=path, step=state["step"], tensors=tensors, state=state, sha256=sha256(path / "manifest.json"))


def _load_file(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:  # its sum is right: whoever wrote it wrote something else
        raise CheckpointError(f"{file}: not a file of safetensors: {error}") from error
