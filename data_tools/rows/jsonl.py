"""JSONL: a JSON object a line (or one JSON list of objects), a sample each; a caption may be a text or a list of texts.

Also the manifests of NeMo and others: {"audio_filepath": "a.wav", "text": "...", "duration": 1.2}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from clipscale.errors import DataError
from data_tools.rows._columns import ColumnRows
from data_tools.rows._json_stream import list_items
from data_tools.rows._text import json_object, open_text, undecodable

_HEAD = 1 << 20


class Jsonl(ColumnRows):
    """A file with a JSON object a line."""

    general: ClassVar[bool] = True

    encoding: str | None = None
    """How the text is encoded; when not said, as its byte order mark says, else UTF-8."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_file() and (path.suffix.lower() in (".jsonl", ".ndjson", ".manifest") or _holds_objects(path))

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        with open_text(self.input, self.encoding) as file:
            try:
                if _is_list(file.read(_HEAD)):
                    yield from self._list()
                    return
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, undecodable(line) or json_object(line)
            except UnicodeError as error:
                raise DataError(f"input {self.input}: not text in the encoding that its first bytes promise ({error})") from error

    def _list(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Items of a file that is one JSON list, counted from 1."""
        try:
            with open_text(self.input, self.encoding) as file:
                for number, item in enumerate(list_items(file), start=1):
                    yield number, item if isinstance(item, dict) else f"a JSON {type(item).__name__}, not an object"
        except ValueError as error:
            raise DataError(f"input {self.input}: it cannot be read as JSON ({error})") from error


def _is_list(head: str) -> bool:
    return head.lstrip().startswith("[")


def _holds_objects(path: Path) -> bool:
    """Whether a .json file is a list, or holds an object on its first line already, as NeMo's manifests do."""
    if path.suffix.lower() != ".json":
        return False
    with open_text(path) as file:
        first = file.readline(_HEAD)
        more = file.readline(_HEAD)
    return _is_list(first + more) or (isinstance(json_object(first), dict) and isinstance(json_object(more), dict))
