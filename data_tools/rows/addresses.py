"""Addresses: a text file with an address of the web a line, and behind a tab its caption.

Tables, JSONL and parquet may name addresses in a column too; those are read as what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TextIO
from urllib.parse import unquote, urlsplit

from clipscale.errors import DataError
from data_tools.media import Address, is_address
from data_tools.rows import Row, Rows
from data_tools.rows._columns import FETCHED
from data_tools.rows._media import is_speech

_HEAD = 100
_LONGEST_LINE = 1 << 20


class Addresses(Rows):
    """A list of addresses; those that end as the names of recordings do are recordings, all others images."""

    caption_template: str | None = None
    """The caption of lines without one: `{name}` is the file's name, without its ending and with spaces for _ and -."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_file() or path.suffix.lower() not in (".txt", ".urls", ".lst", ".list", ""):
            return False
        with _opened(path) as file:
            return is_address(next((line for line in islice(file, _HEAD) if line.strip() and not line.startswith("#")), ""))

    def guesses(self) -> list[str]:
        head = list(islice(self.read(), _HEAD))
        if not any(isinstance(row.image or row.speech, Address) for row in head):
            raise DataError(f"input {self.input}: its first {len(head)} lines hold no address (http://... or https://...)")
        if not any(row.captions for row in head):
            raise DataError(
                f"input {self.input}: none of its first {len(head)} lines has a caption; put a tab and the caption behind each address, "
                f"or make captions of the files' names: --caption-template '{{name}}'"
            )
        recordings = sum(row.speech is not None for row in head)
        captions = "what stands behind the tab" + (f", else {self.caption_template}" if self.caption_template else "")
        return [
            f"of the first {len(head)} lines {recordings} name recordings, {len(head) - recordings} images",
            f"captions: {captions}",
            FETCHED,
        ]

    def read(self) -> Iterator[Row]:
        with _opened(self.input) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), start=1):
                if line.strip() and not line.startswith("#"):
                    yield self._row(f"{self.input.name}:{number}", line)

    def _row(self, name: str, line: str) -> Row:
        url, tab, caption = line.strip().partition("\t")
        url = url.strip()
        if not is_address(url):
            return Row(name, problem=f"forbidden address: '{url[:200]}' is neither http nor https")
        path = PurePosixPath(unquote(_path(url)))
        captions = tuple(part.strip() for part in caption.split("\t") if part.strip()) if tab else ()
        if not captions and self.caption_template is not None:
            captions = (self.caption_template.replace("{name}", path.stem.replace("_", " ").replace("-", " ")),)
        medium = Address(url)
        return Row(name, None, medium, captions, {"url": url}) if is_speech(path.name) else Row(name, medium, None, captions, {"url": url})


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="replace")


def _path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError:
        return ""
