"""Table: a csv or tsv file with a line of column names, a sample a line.

The separator is the one of comma, semicolon, tab and bar that the first line holds most of. Text must be UTF-8.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipscale.errors import DataError
from data_tools.rows._columns import ColumnRows
from data_tools.rows._media import is_image, is_speech


class Table(ColumnRows):
    """A csv or tsv file."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in (".csv", ".tsv", ".txt")

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        csv.field_size_limit(1 << 24)
        with self.input.open(encoding="utf-8-sig", newline="") as file:
            try:
                first = file.readline()
                file.seek(0)
                reader = csv.reader(file, delimiter=_separator(first, self.input), skipinitialspace=True)
                names = self._names(next(reader, []))
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield reader.line_num, _values(names, cells)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"input {self.input}: not UTF-8 ({error}); convert it, for instance: iconv -f latin1 -t utf-8 {self.input.name}"
                ) from error
            except csv.Error as error:
                raise DataError(f"input {self.input}, near line {reader.line_num}: {error}") from error

    def _names(self, cells: list[str]) -> list[str]:
        names = [cell.strip() for cell in cells]
        if not any(names):
            raise DataError(f"input {self.input}: it is empty; its first line must hold the names of the columns")
        if any(is_image(name) or is_speech(name) for name in names):
            raise DataError(
                f"input {self.input}: its first line holds a file name ({', '.join(names)[:100]}), not the names of the columns; "
                f"add a first line such as 'file,caption'"
            )
        twice = sorted({name for name in names if names.count(name) > 1 and name})
        if twice:
            raise DataError(f"input {self.input}: column '{twice[0]}' comes twice in its first line")
        return names


def _separator(first: str, path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t|", key=first.count)


def _values(names: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) > len(names):
        return f"it has {len(cells)} cells, the first line names {len(names)} columns; put quotes around a cell that holds the separator"
    return {name: cell.strip() for name, cell in zip(names, cells, strict=False) if name}
