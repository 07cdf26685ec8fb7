"""Texts by id, on the disk: what a file tells in one place and needs in another, in memory that does not grow with it."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from clipscale.errors import DataError

_CACHE_KB = 32_768


class TextsById:
    """A table in the folder for temporary files, removed in the end."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="clipscale-join-")
        self._database = sqlite3.connect(Path(self._folder.name) / "texts", isolation_level=None)
        for line in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KB}"):  # a kill loses what is made again anyway
            self._database.execute(f"PRAGMA {line}")
        self._database.execute("CREATE TABLE texts (id, text TEXT)")  # ids of any kind: 1 is not '1'
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._database.close()
        self._folder.cleanup()

    def add(self, pairs: Iterable[tuple[str | int, str]]) -> None:
        """Keep texts by their ids, once; texts of one id stay in their order.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO texts VALUES (?, ?)", pairs)
            self._database.execute("CREATE INDEX by_id ON texts (id)")
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise DataError(
                f"captions are sorted by image in {self._folder.name}, and there: {error}; make room, or name another folder in TMPDIR"
            ) from error

    def texts(self, identity: str | int) -> tuple[str, ...]:
        """The texts of an id; none when it has none."""
        return tuple(text for (text,) in self._database.execute("SELECT text FROM texts WHERE id = ? ORDER BY rowid", (identity,)))

    def count(self, identity: str | int) -> int:
        """How many texts it has."""
        return int(self._database.execute("SELECT count(*) FROM texts WHERE id = ?", (identity,)).fetchone()[0])
