"""Flickr8k and Flickr30k as first published: `1000092795.jpg#0<tab>A caption .`, five lines an image and no line of column names.

Tables of theirs that have column names (captions.txt, results.csv, flickr_annotations_30k.csv) are read as tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from data_tools.rows._columns import ColumnRows, Columns
from data_tools.rows._text import open_text, undecodable

_LINE = re.compile(r"(\S.*\.(?:jpe?g|png)\S*)#\d+\t(.*)", re.IGNORECASE)


class Flickr(ColumnRows):
    """A token file: lines that follow each other with the same image are one sample."""

    known_columns: ClassVar[Columns | None] = Columns("image", None, ("caption",), None, None, None, ())

    encoding: str | None = None
    """How the text is encoded; when not said, as its byte order mark says, else UTF-8."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_file() or path.suffix.lower() not in (".txt", ".token", ".tsv"):
            return False
        with open_text(path) as file:
            return _LINE.fullmatch(file.readline(4096).strip()) is not None

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        with open_text(self.input, self.encoding) as file:
            for number, line in enumerate(file, start=1):
                found = _LINE.fullmatch(line.strip())
                if found:
                    yield number, undecodable(line) or {"image": found[1], "caption": found[2]}
                elif line.strip():
                    yield number, "it is not an image's name, #, a number, a tab and a caption"
