"""Cells: images and recordings inside the columns of parquet and arrow files, read when their shard is built.

A cell holds bytes, or what Hugging Face's Image and Audio features store: `{bytes, path}`, where bytes may be missing
and the path then names a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from data_tools.media import MediumState, StoredMedium, changed_ns, read_file
from data_tools.packing import BadRow

_ROWS = 64  # of a column that are held decoded at a time


@dataclass(frozen=True)
class ParquetCell(StoredMedium):
    """A cell of a parquet file."""

    file: Path
    group: int
    row: int
    """In its row group."""
    column: str
    rows: int
    """Of the whole file, so that another file in its place is noticed."""

    def __str__(self) -> str:
        return f"row {self.row} of row group {self.group}, column {self.column} in {self.file}"

    def state(self) -> MediumState:
        return MediumState([self.rows, self.group, self.row, self.column], 0, changed_ns(self.file))

    def read(self) -> bytes:
        column = _parquet_column(self.file, changed_ns(self.file), self.group, self.column)
        return _bytes_in(column.cell(self.row), self)


@dataclass(frozen=True)
class ArrowCell(StoredMedium):
    """A cell of an arrow file, as Hugging Face's `save_to_disk` writes them."""

    file: Path
    row: int
    column: str
    rows: int

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column} in {self.file}"

    def state(self) -> MediumState:
        return MediumState([self.rows, self.row, self.column], 0, changed_ns(self.file))

    def read(self) -> bytes:
        table = mapped_table(self.file, changed_ns(self.file))
        if self.column not in table.column_names or table.num_rows != self.rows:
            raise _changed(self)
        return _bytes_in(table.column(self.column)[self.row].as_py(), self)


@lru_cache(maxsize=8)
def mapped_table(file: Path, changed: int) -> pyarrow.Table:
    """An arrow file as a table that takes no memory: its values stay in the file. `changed` keeps a newer file from being taken for it.

    Raises:
        pyarrow.ArrowException: it is no arrow file, or cut off.
    """
    del changed
    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


class _ParquetColumn:
    """One column of a row group, a few rows of it in memory; cheap to read in order."""

    def __init__(self, file: Path, group: int, column: str) -> None:
        self._file, self._group, self._column = file, group, column
        self._rewind()

    def _rewind(self) -> None:
        self._start, self._values = 0, list[Any]()
        self._batches = self._read()

    def _read(self) -> Iterator[list[Any]]:
        with pyarrow.parquet.ParquetFile(self._file, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from (
                batch.column(0).to_pylist()
                for batch in file.iter_batches(_ROWS, row_groups=[self._group], columns=[self._column], use_threads=False)
            )

    def cell(self, row: int) -> Any:
        if row < self._start:
            self._rewind()
        while row >= self._start + len(self._values):
            self._start += len(self._values)
            self._values = next(self._batches, [])
            if not self._values:
                raise BadRow("changed file", f"{self._file}: row group {self._group} has no row {row} any more; run the build again")
        return self._values[row - self._start]


@lru_cache(maxsize=2)  # an image and a recording
def _parquet_column(file: Path, changed: int, group: int, column: str) -> _ParquetColumn:
    del changed
    try:
        return _ParquetColumn(file, group, column)
    except pyarrow.ArrowException as error:
        raise ValueError(f"it cannot be read as parquet ({error})") from error


def _bytes_in(value: Any, cell: ParquetCell | ArrowCell) -> bytes:
    if isinstance(value, dict):
        name = value.get("path")
        value = value.get("bytes")
        if value is None and name:
            return read_file(cell.file.parent / name)
    if value is None:
        raise BadRow("no image or recording", f"{cell} is empty")
    if not isinstance(value, bytes):
        raise BadRow("unreadable file", f"{cell} holds a {type(value).__name__}, not bytes")
    return value


def _changed(cell: ArrowCell) -> BadRow:
    return BadRow("changed file", f"{cell.file} is not the file that was there when the build began; run it again")
