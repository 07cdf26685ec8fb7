"""Where an image or a recording lies before it is packed, what tells it from another, and how its bytes are read.

A file is a `Path`, bytes are `bytes`; every other place is a `StoredMedium` that knows how to read itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.packing import BadRow

_MAX_FILE_BYTES = 1 << 30
_CHUNK = 1 << 20
_READ = os.O_RDONLY | os.O_NONBLOCK  # a pipe among the files must not keep us waiting


@dataclass(frozen=True)
class MediumState:
    """What is known of a medium before it is read."""

    identity: Any
    """A JSON value that tells it from another; without where it lies, and without when it was written."""
    size: int
    """Bytes; 0 when not known."""
    changed: int
    """When it was changed last; 0 when not known."""
    missing: bool = False


class StoredMedium(ABC):
    """A medium inside something else; a frozen dataclass of JSON values and paths, so that a plan can hold it."""

    @abstractmethod
    def state(self) -> MediumState:
        """What is known of it without reading it."""

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes.

        Raises:
            BadRow: they are not there, or not those that were there when the plan was made.
            OSError: they cannot be read.
        """


Medium = Path | bytes | StoredMedium
"""Where an image or a recording lies, or its bytes."""


@dataclass(frozen=True)
class TarMember(StoredMedium):
    """A file inside a tar, found again by its place."""

    tar: Path
    name: str
    offset: int
    size: int
    crc32: int
    """Of its bytes, so that a tar changed in between is noticed."""

    def __str__(self) -> str:
        return f"{self.name} in {self.tar}"

    def state(self) -> MediumState:
        return MediumState([self.size, self.crc32], self.size, changed_ns(self.tar))

    def read(self) -> bytes:
        with self.tar.open("rb") as tar:
            tar.seek(self.offset)
            data = tar.read(self.size)
        if zlib.crc32(data) != self.crc32:
            raise BadRow("changed file", f"{self}: its bytes are not those that were there when the build began; run it again")
        return data


@dataclass(frozen=True)
class Address(StoredMedium):
    """A medium on the web; fetched before its shard is built (data_tools/fetch)."""

    url: str

    def __str__(self) -> str:
        return self.url

    def state(self) -> MediumState:
        return MediumState(["address", self.url], 0, 0)

    def read(self) -> bytes:
        raise BadRow("not fetched", self.url)


def is_address(text: Any) -> bool:
    """Whether this is a text that names something on the web."""
    return isinstance(text, str) and text.strip()[:8].lower().startswith(("http://", "https://"))


def medium_state(medium: Medium | None) -> MediumState:
    """What is known of the medium without reading it."""
    if medium is None:
        return MediumState(None, 0, 0)
    if isinstance(medium, bytes):
        return MediumState(hashlib.sha256(medium).hexdigest(), len(medium), 0)
    if isinstance(medium, StoredMedium):
        return medium.state()
    found = _stat(medium)
    return MediumState(found.st_size, found.st_size, found.st_mtime_ns) if found else MediumState("missing", 0, 0, missing=True)


def read_medium(medium: Medium) -> bytes:
    """The bytes of an image or a recording.

    Raises:
        BadRow: they are missing, unreadable, or far too many.
    """
    if isinstance(medium, bytes):
        return medium
    try:
        return medium.read() if isinstance(medium, StoredMedium) else read_file(medium)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRow("missing file", str(medium)) from None
    except (OSError, ValueError) as error:
        raise BadRow("unreadable file", f"{medium}: {error}") from error


def read_file(path: Path | str) -> bytes:
    """The bytes of a plain file of at most 1 GiB."""
    descriptor = os.open(path, _READ)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_size > _MAX_FILE_BYTES:
            raise BadRow("unreadable file", f"{path}: no plain file, or larger than {_MAX_FILE_BYTES} bytes")
        data = os.read(descriptor, state.st_size + 1)
        if len(data) != state.st_size:  # it grew, or came in pieces
            data += b"".join(iter(lambda: os.read(descriptor, _CHUNK), b""))
        return data
    finally:
        os.close(descriptor)


def changed_ns(path: Path) -> int:
    """When a file was changed last; 0 when there is none."""
    found = _stat(path)
    return found.st_mtime_ns if found else 0


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 (a build stats millions of files, and Path.stat takes twice the time)
    except (OSError, ValueError):
        return None
