"""Where a data set is written: a folder, or a store that fsspec reaches.

Whatever is written stands under its name only when it is whole. A folder gets files written beside their names, synced and
renamed. A store gets them from a scratch folder on this machine: stores whose uploads appear when they are whole (S3 and its
kin) directly, all others under another name and then moved.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import fsspec

from clipscale.data.shards import aside
from clipscale.errors import DataError, MissingPackage

WORK = ".build"
"""Where the plan and the marks of finished jobs are while a data set is being built."""
_WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}


class Output(ABC):
    """A place for a data set. Names are relative to it; those of the work folder begin with `.build/`."""

    url: str
    """As the user wrote it."""
    folder: Path
    """On this machine: where shards are written, and the work folder with the plan lies."""

    @property
    def plan(self) -> Path:
        """The plan, on this machine."""
        return self.folder / WORK / "plan.parquet"

    @abstractmethod
    def exists(self) -> bool:
        """Whether the place is there."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file in it, by name; those of the work folder are left out."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's bytes; None when it is not there."""

    @abstractmethod
    def publish(self, *names: str) -> None:
        """Let files of `folder` stand in the output, one after the other."""

    @abstractmethod
    def fetch(self, name: str) -> Path | None:
        """Have a file of the output in `folder`, on this machine; None when there is none."""

    def fetch_plan(self) -> bool:
        """Have the plan of the output on this machine; False when there is none."""
        return self.fetch(f"{WORK}/plan.parquet") is not None

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file another name, that of a file which it replaces."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def close(self, *, created: bool) -> None:
        """Leave nothing beside a whole data set, and nothing at all where nothing was begun."""

    @contextmanager
    def claimed(self, node: int | None) -> Iterator[None]:
        """Hold the output against another build of this machine, as a whole build or as one node of several.

        Raises:
            DataError: another holds it, or it cannot be written.
        """
        created = not self.folder.exists()
        with _locked(self.folder / WORK, self.url, node):
            try:
                yield
            finally:
                self.close(created=created)

    def write_lines(self, name: str, lines: Iterable[str]) -> None:
        """Write a text file, line by line."""
        write_lines(self.folder / name, lines)
        self.publish(name)

    def marks(self) -> set[int]:
        """Shards whose jobs are done."""
        return {int(name.removesuffix(".json")) for name in self.work_names(".json") if name.removesuffix(".json").isdigit()}

    def work_names(self, suffix: str) -> list[str]:
        """Files of the work folder whose names end so."""
        return [name for name in self._work_names() if name.endswith(suffix)]

    @abstractmethod
    def _work_names(self) -> list[str]: ...


@dataclass(frozen=True)
class FolderOutput(Output):
    """A folder of this machine, or one that several machines share."""

    url: str
    folder: Path

    def exists(self) -> bool:
        return self.folder.exists()

    def sizes(self) -> dict[str, int]:
        if not self.folder.exists():
            return {}
        if not self.folder.is_dir():
            raise DataError(f"output {self.url}: a file is in the way; give a new folder")
        found = {}
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another node's temporary file
                found[path.name] = path.stat().st_size
        found.pop(WORK, None)
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def publish(self, *names: str) -> None:
        """They stand there already."""

    def fetch(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None

    def rename(self, old: str, new: str) -> None:
        (self.folder / old).replace(self.folder / new)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def close(self, *, created: bool) -> None:
        begun = (self.folder / "build.json").exists() or any((self.folder / WORK).glob("*.mark"))
        if (self.folder / "index.parquet").exists() or not begun:
            shutil.rmtree(self.folder / WORK, ignore_errors=True)
        if created and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _work_names(self) -> list[str]:
        return [path.name for path in (self.folder / WORK).iterdir()]


@dataclass(frozen=True)
class StoreOutput(Output):
    """A folder of a store; what is written waits in a folder of this machine until it is uploaded."""

    url: str
    folder: Path

    def exists(self) -> bool:
        return bool(self.sizes())

    def sizes(self) -> dict[str, int]:
        store, root = self._store()
        try:
            entries = store.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        store, root = self._store()
        try:
            return bytes(store.cat_file(f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def publish(self, *names: str) -> None:
        store, root = self._store()
        protocols = {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)
        for name in names:
            here, there = self.folder / name, f"{root}/{name}"
            store.makedirs(there.rpartition("/")[0], exist_ok=True)
            if protocols & _WHOLE_UPLOADS:
                store.put_file(str(here), there)
            else:
                upload = f"{root}/{WORK}/upload-{secrets.randbits(62)}-{name.rpartition('/')[2]}"
                store.makedirs(f"{root}/{WORK}", exist_ok=True)
                store.put_file(str(here), upload)
                store.mv(upload, there)
            if name != f"{WORK}/plan.parquet":
                here.unlink()

    def fetch(self, name: str) -> Path | None:
        store, root = self._store()
        path = self.folder / name
        try:
            store.get_file(f"{root}/{name}", str(path))
        except FileNotFoundError:
            path.unlink(missing_ok=True)  # some stores have begun it by then
            return None
        return path

    def rename(self, old: str, new: str) -> None:
        store, root = self._store()
        store.mv(f"{root}/{old}", f"{root}/{new}")

    def remove(self, name: str) -> None:
        store, root = self._store()
        with suppress(FileNotFoundError):
            store.rm_file(f"{root}/{name}")

    def close(self, *, created: bool) -> None:
        del created  # stores have no empty folders
        store, root = self._store()
        if self.size("index.parquet") is not None:
            with suppress(FileNotFoundError):
                store.rm(f"{root}/{WORK}", recursive=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        store, root = self._store()
        try:
            return int(store.info(f"{root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def _work_names(self) -> list[str]:
        store, root = self._store()
        try:
            return [name.rsplit("/", 1)[-1] for name in store.ls(f"{root}/{WORK}", detail=False)]
        except FileNotFoundError:
            return []

    def _store(self) -> tuple[Any, str]:
        store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        return store, root.rstrip("/")


def open_output(url: str | Path, *, scratch: Path | None = None, node: int = 0) -> Output:
    """The place at a path or fsspec address; `scratch` is where shards wait for their upload to a store.

    Raises:
        DataError: no such kind of address.
        MissingPackage: its fsspec back-end is not installed.
    """
    text = str(url)
    if "://" not in text:
        return FolderOutput(text, Path(text))
    if text.startswith(("file://", "local://")):
        return FolderOutput(text, Path(text.partition("://")[2]))
    output = StoreOutput(text, _scratch(text, scratch, node))
    try:
        output._store()
    except ImportError as error:
        raise MissingPackage(f"output {text}: {error}") from error
    except ValueError as error:
        raise DataError(f"output {text}: {error}") from error
    return output


def _scratch(url: str, scratch: Path | None, node: int) -> Path:
    """A folder that the same build finds again, so that what a kill leaves in it is used or removed."""
    name = f"clipscale-shards-{os.getuid()}-{hashlib.sha256(f'{url} {node}'.encode()).hexdigest()[:16]}"
    return (scratch or Path(tempfile.gettempdir())) / name


@contextmanager
def _locked(work: Path, url: str, node: int | None) -> Iterator[None]:
    """Locks in the work folder: a whole build holds it alone, nodes share it and hold their own."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        shared = (work / "lock").open("w")
        own = (work / f"lock-{node}").open("w")
    except OSError as error:
        raise DataError(f"output {url}: cannot be written ({error}); give another folder") from error
    with shared, own:
        _lock(shared, fcntl.LOCK_EX if node is None else fcntl.LOCK_SH, url)
        _lock(own, fcntl.LOCK_EX, url)
        yield


def _lock(file: TextIO, how: int, url: str) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"output {url}: another build is at work on it; wait for its end") from None


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file that stands under its name only when it is whole and on disk."""
    temporary = aside(path)
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
