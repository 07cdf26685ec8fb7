"""Rows of named columns: which column holds what, guessed from names and values unless said.

A table and a JSONL file differ only in how their lines are read; everything after that is here.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from clipscale.errors import ConfigError, DataError
from clipscale.settings import did_you_mean
from data_tools.media import Address, Medium, StoredMedium, is_address
from data_tools.rows import Row, Rows
from data_tools.rows._media import is_image, is_speech, locate

_HEAD = 100  # lines looked at before guessing
_CAPTION_NAMES = (
    r"captions?([ _-]?\d+)?|caption[ _-]?(text|\w\w)",
    r"(raw_?)?texts?",
    r"sentences?|transcripts?|transcriptions?|utterances?|normali[sz]ed_?(text|transcript)",
    r"raw|alt([ _-]?text)?|titles?|descriptions?|prompts?|comments?",
)
"""Names of caption columns, best first; all columns that fit the first pattern that fits any are captions."""
_FIELD_NAMES = {
    "label": r"labels?|class([ _-]?name)?|category",
    "intent": r"intent([ _-]?(name|label))?",
    "speaker": r"speaker([ _-]?id)?|client[ _-]?id",
}


FETCHED = "addresses: fetched from the web; what robots.txt, X-Robots-Tag and TDM-Reservation keep back is left out"
"""Said of inputs that name media on the web."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    image: str | None
    speech: str | None
    captions: tuple[str, ...]
    label: str | None
    intent: str | None
    speaker: str | None
    slots: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the user to check."""
        parts = {
            "image": self.image,
            "recording": self.speech,
            "captions": ", ".join(self.captions),
            "label": self.label,
            "intent": self.intent,
            "speaker": self.speaker,
            "slots": ", ".join(self.slots),
        }
        return [f"{what}: column {name}" for what, name in parts.items() if name]


class ColumnRows(Rows):
    """Lines of named values."""

    known_columns: ClassVar[Columns | None] = None
    """What the columns hold, in kinds that know; None where it must be guessed."""

    image_column: str | None = None
    """Column with the image's file name; guessed from values ending in .jpg, .png, ... when not given."""
    speech_column: str | None = None
    """Column with the recording's file name; guessed from values ending in .wav, .flac, ... when not given."""
    caption_columns: tuple[str, ...] = ()
    """Columns with captions; guessed from names such as caption, text, sentence, transcript when not given."""
    label_column: str | None = None
    """Column with the class; kept as `label`."""
    intent_column: str | None = None
    """Column with a command's intent; kept as `intent`."""
    speaker_column: str | None = None
    """Column with who speaks; kept as `speaker`."""
    slot_columns: tuple[str, ...] = ()
    """Columns with a command's slots (action, object, location, ...); kept as `slots`."""
    media_folder: Path | None = None
    """Folder that file names are relative to; when not given, the one the input lies in, or one in there or beside it that has them."""

    @abstractmethod
    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Line number and values, or what is wrong with the line; blank lines are left out."""

    def media_in_cells(self) -> dict[str, str]:
        """Columns whose values are media themselves, not names of files: 'image' or 'speech' of each."""
        return {}

    def guesses(self) -> list[str]:
        head = self._head()
        columns = self._columns(head)
        folder = self._media_folder(columns, head)
        names = _file_names(columns, head)
        if names and not any(locate(name, folder).is_file() for name in names):
            raise DataError(
                f"input {self.input}: none of the files in its first {len(head)} rows is there, for instance {locate(names[0], folder)}; "
                f"say where they lie with --images-folder"
            )
        together = "lines that follow each other with the same file: one sample, several captions"
        return [
            *columns.lines(),
            *([f"files: relative to {folder}"] if names else []),
            *([FETCHED] if _names_addresses(columns, head) else []),
            together,
        ]

    def read(self) -> Iterator[Row]:
        head = self._head()
        columns = self._columns(head)
        folder = self._media_folder(columns, head)
        web = _names_addresses(columns, head)
        yield from _joined(self._row(number, values, columns, folder, web=web) for number, values in self.lines())

    def _head(self) -> list[dict[str, Any]]:
        lines = list(islice(self.lines(), _HEAD))
        head = [values for _, values in lines if isinstance(values, dict)]
        wrong = next(((number, values) for number, values in lines if isinstance(values, str)), None)
        if wrong and wrong[1].startswith("not text"):
            raise DataError(f"input {self.input}, line {wrong[0]}: {wrong[1]}; say which with --encoding, or mend the line")
        if not head:
            raise DataError(f"input {self.input}: " + (f"line {wrong[0]}: {wrong[1]}" if wrong else "it holds no rows"))
        return head

    def _columns(self, head: Sequence[dict[str, Any]]) -> Columns:
        """Which column holds what; a ConfigError or DataError when one that is needed does not exist."""
        names = list(dict.fromkeys(name for values in head for name in values))
        self._check_names(names)
        if self.known_columns is not None:
            return self.known_columns
        image, speech = self._media_columns(names, head)
        fields = {field: getattr(self, f"{field}_column") or _named(names, pattern) for field, pattern in _FIELD_NAMES.items()}
        captions = self.caption_columns or self._guess_captions(names, {image, speech})
        return Columns(image, speech, captions, slots=self.slot_columns, **fields)

    def _media_folder(self, columns: Columns, head: Sequence[dict[str, Any]]) -> Path:
        """The folder said; else the first with one of the first files: where the input lies, or a folder in there or beside it."""
        here = self.input.parent
        if self.media_folder is not None:
            beside = here / self.media_folder
            folder = self.media_folder if self.media_folder.is_dir() or not beside.is_dir() else beside
            if not folder.is_dir():
                raise DataError(f"folder {self.media_folder} for the files that {self.input.name} names: there is no such folder")
            return folder
        names = _file_names(columns, head)
        near = (here, here.absolute().parent, *_folders_in(here))
        return next((folder for folder in near if any(locate(name, folder).is_file() for name in names)), here)

    def _check_names(self, names: Sequence[str]) -> None:
        asked = (self.image_column, self.speech_column, *self.caption_columns, self.label_column, self.intent_column, self.speaker_column)
        for name in (*asked, *self.slot_columns):
            if name is not None and name not in names:
                raise ConfigError(
                    f"input {self.input}: there is no column '{name}'{did_you_mean(name, names)} (it has: {', '.join(names)})"
                )

    def _media_columns(self, names: Sequence[str], head: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
        if self.image_column or self.speech_column:
            return self.image_column, self.speech_column
        cells = self.media_in_cells()
        image = next((name for name in names if cells.get(name) == "image" or _mostly(is_image, name, head)), None)
        speech = next((name for name in names if cells.get(name) == "speech" or _mostly(is_speech, name, head)), None)
        if image is None and speech is None:
            image = next((name for name in names if _mostly(is_address, name, head)), None)
        if image is None and speech is None:
            raise DataError(
                f"input {self.input}: no column holds names of image or sound files (.jpg, .wav, ...) or addresses in its first "
                f"{len(head)} rows; "
                f"say which with --image-column or --speech-column; it has: {', '.join(names)}"
            )
        return image, speech

    def _guess_captions(self, names: Sequence[str], taken: set[str | None]) -> tuple[str, ...]:
        free = [name for name in names if name not in taken]
        for pattern in (*_CAPTION_NAMES, _FIELD_NAMES["label"]):
            found = tuple(name for name in free if re.fullmatch(pattern, name.strip(), re.IGNORECASE))
            if found:
                return found
        raise DataError(f"input {self.input}: no column looks like captions; say which with --caption-column; it has: {', '.join(names)}")

    def _row(self, number: int, values: dict[str, Any] | str, columns: Columns, folder: Path, *, web: bool) -> Row:
        name = f"{self.input.name}:{number}"
        if isinstance(values, str):
            return Row(name, problem=f"unreadable line: {values}")
        image, speech = (_media(values, column, folder) for column in (columns.image, columns.speech))
        elsewhere = (str, Address) if not web else str  # what the user was not told of is not fetched
        problem = next((f"not a local file: {media}" for media in (image, speech) if isinstance(media, elsewhere)), "")
        if problem:
            return Row(name, problem=problem, columns=values)
        captions = tuple(caption for column in columns.captions for caption in _texts(values.get(column)))
        record = self.record(values, columns)
        url = next((medium.url for medium in (image, speech) if isinstance(medium, Address)), None)
        if url is not None:
            record.setdefault("url", url)
        return Row(name, image, speech, captions, record, columns=values)  # type: ignore[arg-type]

    def record(self, values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
        """What is kept beside the captions: every other column under its name, and the known fields under theirs."""
        return _record(values, columns)


def _names_addresses(columns: Columns, head: Sequence[Mapping[str, Any]]) -> bool:
    """Whether media of the first rows are on the web."""
    return any(is_address(values.get(column)) for values in head for column in (columns.image, columns.speech) if column)


def _named(names: Sequence[str], pattern: str) -> str | None:
    return next((name for name in names if re.fullmatch(pattern, name.strip(), re.IGNORECASE)), None)


def _mostly(test: Any, name: str, head: Sequence[Mapping[str, Any]]) -> bool:
    values = [values[name] for values in head if isinstance(values.get(name), str) and values[name]]
    return bool(values) and sum(map(test, values)) * 2 > len(values)


def _media(values: Mapping[str, Any], column: str | None, folder: Path) -> Medium | str | None:
    """The medium; or the text that names no file; or None when the cell is empty."""
    name = values.get(column) if column else None
    if isinstance(name, StoredMedium):
        return name
    if is_address(name):
        return Address(str(name).strip())
    if name is None or name == "":
        return None
    if not isinstance(name, str) or re.match(r"[a-z0-9+]{2,}://|data:", name, re.IGNORECASE) or "\0" in name:
        return str(name)[:200]
    return locate(name, folder)


def _file_names(columns: Columns, head: Sequence[Mapping[str, Any]]) -> list[str]:
    """The files of the first rows."""
    column = columns.image or columns.speech
    cells = (_media(values, column, Path()) for values in head)
    return [str(cell) for cell in cells if isinstance(cell, Path)]


def _folders_in(place: Path) -> Iterator[Path]:
    """Folders in a folder, then those beside it, such as `images` beside `annotations`; 200 at most."""
    for parent in (place, place.absolute().parent):
        yield from islice((path for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith(".")), 100)


def _texts(value: Any) -> list[str]:
    """The captions in a cell: a text, a number, or a list of them."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict) and isinstance(value.get("raw"), str):
        return [value["raw"]]
    if value is None or isinstance(value, dict | StoredMedium):
        return []
    return _listed(value) if isinstance(value, str) and value.startswith('["') else [str(value)]


def _listed(text: str) -> list[str]:
    """The captions of a cell that holds a JSON list of them."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return _texts(items) if all(isinstance(item, str) for item in items) else [text]


def _record(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    used = {columns.image, columns.speech, columns.label, columns.intent, columns.speaker, *columns.slots}
    used |= {name for name in columns.captions if name != "transcript"}
    record = {
        name: value
        for name, value in values.items()
        if name not in used and value not in (None, "") and not isinstance(value, StoredMedium)
    }
    for field in _FIELD_NAMES:
        value = values.get(getattr(columns, field) or "")
        if value not in (None, ""):
            record[field] = value
    if isinstance(record.get("slots"), str):
        record["slots"] = _object(record["slots"])
    if columns.slots:
        record["slots"] = {name: values[name] for name in columns.slots if values.get(name) not in (None, "")}
    return record


def _object(text: str) -> Any:
    """The JSON object that a table's cell holds, or the cell when it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _joined(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows that follow each other with the same media become one, with all their captions and the fields they agree on."""
    last: Row | None = None
    for row in rows:
        same = last is not None and not row.problem and not last.problem and (row.image or row.speech) is not None
        if last is not None and same and (row.image, row.speech) == (last.image, last.speech):
            captions = tuple(dict.fromkeys((*last.captions, *row.captions)))
            record = {name: value for name, value in last.record.items() if row.record.get(name) == value}
            last = replace(last, captions=captions, record=record)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last
