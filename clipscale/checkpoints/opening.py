"""Opening: a checkpoint by what people type: a run's folder or one checkpoint's, here or in a store.

One in a store is copied into a folder of the temporary directory, which lasts as long as the `Opening`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from clipscale.checkpoints.reading import Checkpoint, find_newest, load, step_of
from clipscale.checkpoints.store import CheckpointStore, newest_in
from clipscale.errors import RunFolderError


def is_remote(address: str | Path) -> bool:
    """Whether it is an address of a store, and not a folder of this machine."""
    return "://" in str(address)


class Opening:
    """Finds checkpoints and reads them; what it copies from a store is removed at its end."""

    def __init__(self) -> None:
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._copies is not None:
            self._copies.cleanup()

    def find(self, address: str | Path) -> str:
        """The address of a run's newest whole checkpoint, or of the one that was asked for, which `load` takes.

        Raises:
            RunFolderError: there is no whole checkpoint.
            RequestError: no address that is read.
            CheckpointError: the store does not answer.
        """
        found, damaged = self._find_remote(str(address).rstrip("/")) if is_remote(address) else _find_here(Path(address))
        if found is None:
            what = "; ".join(damaged) or "it has no manifest.json and no checkpoints/step-... in it"
            raise RunFolderError(f"{address} is neither a run folder with a whole checkpoint nor a checkpoint: {what}")
        for line in damaged:
            print(f"skipping a damaged checkpoint: {line}", file=sys.stderr)
        return found

    def load(self, found: str) -> Checkpoint:
        """Read what `find` found, perhaps on another rank.

        Raises:
            CheckpointError: it is missing, partial or damaged; names the file.
        """
        if not is_remote(found):
            return load(Path(found))
        parent, _, name = found.rpartition("/")
        copy = self._folder() / name
        return load(copy if copy.exists() else CheckpointStore(parent).fetch(name, self._folder()))

    def _find_remote(self, address: str) -> tuple[str | None, list[str]]:
        if step_of(address.rpartition("/")[2]) is not None:
            return address, []
        damaged: list[str] = []
        for place in (address, f"{address}/checkpoints"):
            newest, further = newest_in(CheckpointStore(place), self._folder())
            damaged += further
            if newest is not None:
                return f"{place}/{newest.name}", damaged
        return None, damaged

    def _folder(self) -> Path:
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="clipscale-")
        return Path(self._copies.name)


def _find_here(path: Path) -> tuple[str | None, list[str]]:
    if (path / "manifest.json").is_file():
        return str(path), []
    newest, damaged = find_newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    return (None if newest is None else str(newest)), damaged
