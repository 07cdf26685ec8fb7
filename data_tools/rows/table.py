"""Table: a csv or tsv file with a line of column names, a sample a line.

The separator is the one of comma, semicolon, tab and bar that the first line holds most of.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from data_tools.rows._tables import TableRows


class Table(TableRows):
    """A csv or tsv file."""

    general: ClassVar[bool] = True

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in (".csv", ".tsv", ".txt")
