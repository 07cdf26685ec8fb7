"""Text files of other people: their byte order marks, their encodings, and lines that are not in them."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any, TextIO

from clipscale.errors import ConfigError

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_ESCAPED = re.compile(r"[\udc80-\udcff]")


def open_text(path: Path, encoding: str | None = None) -> TextIO:
    """A text file, read with the encoding said, or that of its byte order mark, or UTF-8; undecodable bytes are told by `undecodable`.

    Raises:
        ConfigError: there is no such encoding.
    """
    with path.open("rb") as file:
        start = file.read(4)
    found = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    try:
        codecs.lookup(encoding or found)
    except LookupError:
        raise ConfigError(f"--encoding {encoding}: there is no such encoding; try utf-8, latin-1, cp1252, utf-16 or gb18030") from None
    errors = "strict" if (encoding or found).lower().replace("-", "").startswith(("utf16", "utf32")) else "surrogateescape"
    return path.open(encoding=encoding or found, errors=errors, newline="")


def undecodable(text: str) -> str:
    """What is wrong with a text that `open_text` read; empty when nothing is."""
    if text.isascii():
        return ""
    escaped = _ESCAPED.search(text)
    if not escaped:
        return ""
    before = text[max(0, escaped.start() - 20) : escaped.start()]
    return f"not text in the file's encoding: byte 0x{ord(escaped[0]) - 0xDC00:02x} after '{_ESCAPED.sub('?', before)}'"


def json_object(line: str) -> dict[str, Any] | str:
    """The object that a line holds, or what is wrong with the line; values that are not numbers become None."""
    try:
        values = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return values if isinstance(values, dict) else f"a JSON {type(values).__name__}, not an object"
