"""A file read once, in order, with the sha256 of all of it."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

_CHUNK = 1 << 20


class SummedFile:
    """A file read in order, with the sha256 of all of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        self.position += len(data)
        return data

    def skip_to(self, offset: int) -> None:
        while self.position < offset and self.read(min(_CHUNK, offset - self.position)):
            pass

    def finish(self) -> None:
        while self.read(_CHUNK):
            pass

    def digest(self) -> bytes:
        return self._hash.digest()
