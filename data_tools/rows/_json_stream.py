"""JSON that is larger than memory: the items of its lists, one at a time.

Files of captions are one list of objects, or an object whose members are such lists (COCO, Karpathy). The standard library's parser reads
one value from a text, so text is read in pieces, and a piece is doubled while the value in it is not whole. NaN and Infinity, which are no
JSON but are written by many, become None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, TextIO

from data_tools.rows._text import undecodable

_PIECE = 1 << 16  # characters read at a time
_LARGEST = 1 << 26  # characters of one value
_BLANKS = re.compile(r"[ \t\n\r]*")
_UNSURE = 16  # a value that goes wrong so near the end of what was read may only be cut off there


class _Text:
    """A file's text, of which as much is held as the value under way needs."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._held, self._place = file, "", 0
        self._passed = 0  # characters of the file before what is held
        self._parser = json.JSONDecoder(parse_constant=lambda _: None)

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self._place = _BLANKS.match(self._held, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._held) or not self._more(_PIECE):
                return self._held[self._place : self._place + 1]

    def take(self, characters: str) -> str:
        """The next character that is not blank, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            place = f"character {self._passed + self._place:,}"
            raise ValueError(f"expected {' or '.join(characters)} at {place}, found {found or 'its end'}")
        self._place += 1
        return found

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._parser.raw_decode(self._held, self._place)
                follows = self._held[end : end + 1]
                if (follows and follows not in ".eE") or not self._more(_PIECE):  # a number may go on
                    self._place = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - _UNSURE
                place = self._passed + error.pos
                if not cut_off or not self._more(len(self._held) - self._place):
                    raise ValueError(f"{error.msg} at character {place:,}") from None
            except RecursionError:
                raise ValueError("it is nested too deeply") from None

    def _more(self, characters: int) -> bool:
        """Hold more of the file, and no longer what was read; False at its end."""
        self._passed += self._place
        self._held, self._place = self._held[self._place :], 0
        if len(self._held) > _LARGEST:
            raise ValueError(f"one value has more than {_LARGEST:,} characters")
        piece = self._file.read(max(characters, _PIECE))
        if wrong := undecodable(piece):
            raise ValueError(wrong)
        self._held += piece
        return bool(piece)


def list_items(file: TextIO) -> Iterator[Any]:
    """The items of a file that is one list.

    Raises:
        ValueError: it is not, or is no JSON further down.
    """
    text = _Text(file)
    yield from _items(text)
    _check_end(text)


def member_items(file: TextIO, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and item of those lists that are members of these names of a file's one object, in the file's order.

    Members of these names that are no lists come as they are; others are passed over.

    Raises:
        ValueError: it is no object, or no JSON further down.
    """
    text = _Text(file)
    text.take("{")
    if text.peek() == "}":
        text.take("}")
    else:
        yield from _members(text, names)
    _check_end(text)


def _members(text: _Text, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    while True:
        name = text.value()
        text.take(":")
        items = _items(text) if text.peek() == "[" else [text.value()]
        yield from ((name, item) for item in items if name in names)
        if text.take(",}") == "}":
            return


def _items(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return


def _check_end(text: _Text) -> None:
    if text.peek():
        raise ValueError(f"more follows its end: {text.peek()}")
