"""Shard cache: tars of a store on a disk of this machine, fetched once for all of its processes, the least recently used removed first.

A tar is kept under its sha256 as the data set's index tells it, and stands under that name only when it was whole and had that sum: two
addresses of the same bytes share it, and a store that lies about its files (their etags among it) cannot put wrong bytes in. Processes
agree by locks on files in the folder, which the system gives back when a process dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field

from clipscale.data.store import Garbled
from clipscale.errors import DataError, ShardError
from clipscale.settings import Settings

Fetch = Callable[[Callable[[bytes], object]], None]
"""Calls what it is given with the file's bytes, in order."""
_LOOK_S = 0.1  # how often room is looked for while other processes fill theirs


class Cache(Settings):
    """Where tars of a store are kept."""

    folder: str
    """On a disk of this machine; all ranks and workers of a node, and several runs, may share it."""
    max_bytes: int = Field(default=200_000_000_000, ge=1)
    """Most that the tars in it take. It must hold what a run reads from at a time: the tars of a block of 65,536 samples, of each lane."""


class ShardCache:
    """The folder, opened. Nothing in it belongs to a process, so that it is safe in forks and threads."""

    def __init__(self, settings: Cache) -> None:
        """
        Raises:
            DataError: the folder cannot be written.
        """
        self._folder, self._limit = Path(settings.folder), settings.max_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / "room.lock"):
                pass
        except OSError as error:
            raise DataError(f"cache {self._folder}: cannot be written: {error}") from error

    def check(self, largest: int) -> None:
        """
        Raises:
            DataError: the largest tar has no room in it.
        """
        if largest > self._limit:
            raise DataError(f"cache {self._folder}: max_bytes is {self._limit:,}, and the largest tar has {largest:,} bytes; allow more")

    @contextmanager
    def opened(self, sha256: bytes, size: int, fetch: Fetch) -> Iterator[tuple[int, bool]]:
        """A descriptor of the tar with this sum, and whether it was there already. What is removed meanwhile can be read to its end.

        Raises:
            ShardError: it cannot be fetched, comes with another sum, or the disk is full.
        """
        name = sha256.hex()
        descriptor = self._found(name, size)
        hit = descriptor is not None
        if descriptor is None:
            descriptor, hit = self._fetched(name, size, fetch)
        try:
            yield descriptor, hit
        finally:
            os.close(descriptor)

    def discard(self, sha256: bytes) -> None:
        """Remove a tar that the disk gives back damaged."""
        self._tar(sha256.hex()).unlink(missing_ok=True)

    def _tar(self, name: str) -> Path:
        return self._folder / f"{name}.tar"

    def _found(self, name: str, size: int) -> int | None:
        try:
            descriptor = os.open(self._tar(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(descriptor)  # used just now
        return descriptor

    def _fetched(self, name: str, size: int, fetch: Fetch) -> tuple[int, bool]:
        with _locked(self._lock(name)):
            descriptor = self._found(name, size)  # another process was first
            if descriptor is not None:
                return descriptor, True
            part = self._folder / f"{name}.part"
            part.unlink(missing_ok=True)
            try:
                self._reserve(part, size)
                _write(part, fetch, name)
                part.replace(self._tar(name))
            except OSError as error:
                raise ShardError(f"cache {self._folder}: {error}; make room, or lower max_bytes") from error
            finally:
                part.unlink(missing_ok=True)
            descriptor = self._found(name, size)
            if descriptor is None:
                raise ShardError(f"cache {self._folder}: {name}.tar was removed by something else")
            return descriptor, False

    def _lock(self, name: str) -> Path:
        return self._folder / f"{name[:2]}.lock"  # 256 locks: two tars that share one are fetched one after the other

    def _reserve(self, part: Path, size: int) -> None:
        """Make room, and take it: a file of that size, though nothing is in it yet, counts for all."""
        while True:
            with _locked(self._folder / "room.lock"):
                if self._make_room(size):
                    with part.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_LOOK_S)

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used until there is room; False when what other processes fetch takes it."""
        used, taken = [], 0
        for path in [*self._folder.glob("*.tar"), *self._folder.glob("*.part")]:
            with suppress(FileNotFoundError):
                about = path.stat()
                if path.suffix == ".part" and self._is_left_over(path):
                    path.unlink()
                    continue
                taken += about.st_size
                used.append((about.st_mtime_ns, about.st_size, path))
        for _, bytes_, path in sorted(entry for entry in used if entry[2].suffix == ".tar"):
            if taken + size <= self._limit:
                break
            path.unlink(missing_ok=True)
            taken -= bytes_
        return taken + size <= self._limit

    def _is_left_over(self, part: Path) -> bool:
        """Whether the process that fetched it has died: its lock is free."""
        with self._lock(part.stem).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True


def _write(part: Path, fetch: Fetch, name: str) -> None:
    digest, size = hashlib.sha256(), 0
    with part.open("r+b") as file:

        def write(data: bytes) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        fetch(write)
        file.truncate()
    if digest.hexdigest() != name:
        raise Garbled(f"its sha256 is {digest.hexdigest()[:16]}..., the index says {name[:16]}...: the store sent other bytes")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
