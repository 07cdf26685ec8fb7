"""Store: whole checkpoints of one run in any place that fsspec reaches, `ADDRESS/step-00000300/...`, written after those on disk.

The manifest goes last and is removed first, so what has one was whole when it was written. What comes back is checked by its sums like
any other checkpoint.
"""

from __future__ import annotations

import math
from pathlib import Path

from clipscale.checkpoints.files import make_folder
from clipscale.checkpoints.reading import read_manifest, step_of, verify
from clipscale.checkpoints.retention import kept, loss_of
from clipscale.checkpoints.settings import Checkpoints
from clipscale.checkpoints.writing import put_in_place, remove
from clipscale.credentials import redacted
from clipscale.data.store import Store, open_filesystem
from clipscale.errors import CheckpointError, ClipscaleError, RequestError

_MANIFEST = "manifest.json"


class CheckpointStore:
    """One run's checkpoints at an address."""

    def __init__(self, address: str) -> None:
        """
        Raises:
            RequestError: no address that can be used, or its back-end is not installed.
        """
        self.address = address.rstrip("/")
        self._filesystem, self._root = open_filesystem(self.address)
        self._losses: dict[int, float] = {}

    def names(self) -> list[str]:
        """Names of the checkpoints there, newest first; none when there is no such folder yet.

        Raises:
            CheckpointError: the store does not answer.
        """
        try:
            self._filesystem.invalidate_cache(self._root)
            found = self._filesystem.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:  # every store's client has errors of its own
            raise CheckpointError(f"{self.address}: the store does not say which checkpoints it holds: {_said(error)}") from error
        steps = {name: step for path in found if (step := step_of(name := str(path).rstrip("/").rsplit("/", 1)[-1])) is not None}
        return sorted(steps, key=steps.__getitem__, reverse=True)

    def put(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint there.

        Raises:
            CheckpointError: it could not be copied; the one on disk is whole.
        """
        target = f"{self._root}/{checkpoint.name}"
        self._losses.pop(step_of(checkpoint.name) or 0, None)
        files = sorted(checkpoint.iterdir(), key=lambda file: (file.name == _MANIFEST, file.name))
        try:
            self._remove(target)
            self._filesystem.makedirs(target, exist_ok=True)
            for file in files:
                self._filesystem.put_file(str(file), f"{target}/{file.name}")
        except Exception as error:  # see names
            raise CheckpointError(
                f"{checkpoint} is whole, but could not be copied to {self.address}/{checkpoint.name}: {_said(error)}"
            ) from error

    def remove_others(self, settings: Checkpoints, *, newest: int) -> None:
        """Remove the checkpoints that are not kept, by the rule that holds on disk; a store may hold some that this disk never had.

        Raises:
            CheckpointError: one could not be removed.
        """
        there = {step: name for name in self.names() if (step := step_of(name)) is not None}
        try:
            for step, name in there.items():
                if step not in self._losses:
                    self._losses[step] = self._loss(name)
            for step in there.keys() - kept({step: self._losses[step] for step in there}, settings, newest=newest):
                self._remove(f"{self._root}/{there[step]}")
        except Exception as error:  # see names
            raise CheckpointError(f"{self.address}: old checkpoints could not be removed: {_said(error)}") from error

    def _loss(self, name: str) -> float:
        try:
            return loss_of(bytes(self._filesystem.cat_file(f"{self._root}/{name}/state.json")))
        except FileNotFoundError:  # a copy that was killed
            return math.nan

    def _remove(self, path: str) -> None:
        if self._filesystem.exists(f"{path}/{_MANIFEST}"):
            self._filesystem.rm_file(f"{path}/{_MANIFEST}")
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)

    def fetch(self, name: str, folder: Path) -> Path:
        """Copy a checkpoint from there into `folder`, where it stands under its name once it is whole and checked.

        Raises:
            CheckpointError: it is not there, cannot be read, or is damaged.
        """
        aside = folder / f".{name}.fetched"
        remote = Store(f"{self.address}/{name}")
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            remove(aside)
            make_folder(aside)
            text = remote.read(_MANIFEST)
            for file, entry in read_manifest(text).items():
                with (aside / file).open("xb") as to:
                    remote.fetch(file, entry["bytes"], to.write)
            (aside / _MANIFEST).write_bytes(text)
            if problem := verify(aside):
                raise CheckpointError(problem)
            put_in_place(aside, folder / name)
        except (OSError, ValueError, ClipscaleError) as error:
            remove(aside)
            raise CheckpointError(redacted(f"{self.address}/{name}: {error}")) from error
        return folder / name


def newest_in(store: CheckpointStore, folder: Path, *, after: int = -1) -> tuple[Path | None, list[str]]:
    """Fetch the newest whole checkpoint of a later step than `after`, if there is one; and what was wrong with newer ones.

    Raises:
        CheckpointError: the store does not answer.
    """
    damaged: list[str] = []
    for name in store.names():
        if (step_of(name) or 0) <= after:
            break
        try:
            return store.fetch(name, folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def check_store(address: str) -> None:
    """Refuse an address that can never be one.

    Raises:
        RequestError: says what is wrong with it.
    """
    if not hasattr(CheckpointStore(address)._filesystem, "put_file") or address.partition("://")[0] in ("http", "https"):
        raise RequestError(
            f"checkpoints.store {address}: nothing can be written there; give a folder or an address such as s3://bucket/runs"
        )


def _said(error: Exception) -> str:
    return redacted(f"{type(error).__name__}: {error}")
