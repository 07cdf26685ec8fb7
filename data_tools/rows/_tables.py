"""Tables: csv and tsv files with a line of column names, read as rows of named columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from clipscale.errors import DataError
from data_tools.rows._columns import ColumnRows
from data_tools.rows._media import is_image, is_speech
from data_tools.rows._text import open_text, undecodable


class TableRows(ColumnRows):
    """A csv or tsv file."""

    quoting: ClassVar[Literal[0, 3]] = csv.QUOTE_MINIMAL
    """Whether quotes around a cell belong to it."""

    encoding: str | None = None
    """How the text is encoded; when not said, as its byte order mark says, else UTF-8."""

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        csv.field_size_limit(1 << 24)
        with open_text(self.input, self.encoding) as file:
            try:
                first = file.readline()
                file.seek(0)
                separator = _separator(first, self.input)
                reader = csv.reader(file, delimiter=separator, skipinitialspace=separator != "\t", quoting=self.quoting)
                names = self._names(next(reader, []))
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield reader.line_num, undecodable("".join(cells)) or _values(names, cells)
            except UnicodeError as error:
                raise DataError(f"input {self.input}: not text in the encoding that its first bytes promise ({error})") from error
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


def column_names(path: Path) -> set[str]:
    """The column names in a table's first line, for kinds of tables that are told by them; empty when there are none."""
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv"):
        return set()
    try:
        with open_text(path) as file:
            first = file.readline(1 << 16)
    except (OSError, UnicodeError):
        return set()
    return {name.strip().strip('"') for name in first.strip("\r\n").split(_separator(first, path))}


def _separator(first: str, path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t|", key=first.count)


def _values(names: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) > len(names):
        return f"it has {len(cells)} cells, the first line names {len(names)} columns; put quotes around a cell that holds the separator"
    return {name: cell.strip() for name, cell in zip(names, cells, strict=False) if name}
