"""Writing a checkpoint: beside its final name, file by file, the manifest last; renamed when all of it is on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from clipscale.checkpoints.files import make_folder, safetensors_pieces, synchronise_folder, write_file
from clipscale.errors import CheckpointError


def save(folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str) -> Path:
    """Write a checkpoint into `folder` (a run's checkpoints/); returns its path once it is whole on disk.

    Args:
        tensors: by file, then by name.

    Raises:
        CheckpointError: it could not be written, for want of space say; earlier checkpoints are untouched.
    """
    final = folder / name_of(step)
    aside = folder / f".{final.name}.partial"
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        remove(aside)
        _check_room(folder, tensors)
        make_folder(aside)
        written = {f"{name}.safetensors": write_file(aside / f"{name}.safetensors", safetensors_pieces(tensors[name])) for name in tensors}
        for name, text in (("state.json", json.dumps({"step": step, **state}, indent=1)), ("config.yaml", config)):
            written[name] = write_file(aside / name, [text.encode()])
        manifest = {name: asdict(written[name]) for name in sorted(written)}
        write_file(aside / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        put_in_place(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{final}: could not be written: {error}; earlier checkpoints are untouched") from error
    return final


def _check_room(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse to fill the disk up in vain: the run's logs need the little that is left.

    Raises:
        OSError: there is no room for these tensors.
    """
    size = sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it takes {size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step-{step:08d}"


def put_in_place(aside: Path, final: Path) -> None:
    """Rename a folder whose files are on disk to its final name, in place of what may be there, and make that last.

    Raises:
        OSError: it could not be renamed.
    """
    synchronise_folder(aside)
    if final.exists():  # damaged, or of a course of the run that was given up
        remove(final)
    aside.rename(final)
    synchronise_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint's folder: under another name first, so that no moment shows it in parts.

    Raises:
        OSError: it cannot be renamed.
    """
    if path.name.startswith("."):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
