"""Folder: images and recordings, with a text file beside each, or sorted into folders named after what they show.

`cat.jpg` + `cat.txt` (one caption a line), `a.wav` + `a.txt`, `a.jpg` + `a.wav` + `a.txt`; a `.json` beside them holds
further fields (label, intent, slots, speaker, ...), and captions when there is no `.txt`. Without such files, the folder
a file lies in is its label and its caption: `golden_retriever/17.jpg` is captioned 'golden retriever'.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from clipscale.errors import ConfigError, DataError
from data_tools.rows import Row, Rows
from data_tools.rows._media import holds_tars, is_image, is_speech, visible_files, walk_visible

_HEAD = 2_000  # files looked at before guessing


class Folder(Rows):
    """A folder of media, read recursively in the order of names; hidden files are left out."""

    general: ClassVar[bool] = True

    captions_from: Literal["auto", "files", "folders"] = "auto"
    """`files`: the .txt (or .json) beside each file; `folders`: the name of the folder it lies in."""
    caption_template: str = "{label}"
    """Caption of files sorted into folders; `{label}` becomes the folder's name, `_` and `-` as spaces."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_dir() and not holds_tars(path)

    def guesses(self) -> list[str]:
        head = list(islice(self._groups(), _HEAD))
        media = [path for _, group in head for path in group.media]
        if not media:
            raise DataError(f"input {self.input}: no image and no recording in it{self._what_there_is()}")
        images = sum(is_image(path.name) for path in media)
        source = self._captions_from()
        lines = [f"images and recordings: {images} and {len(media) - images} among the first {len(media)} files"]
        if source == "files":
            without = sum(not (group.text or group.record) for _, group in head if group.media)
            lines.append("captions: the .txt or .json file beside each" + (f"; {without} of them have none" if without else ""))
        else:
            example = next(path for _, group in head for path in group.media)
            lines.append(
                f"captions: the folder each lies in, for instance '{self._caption(example)}' for {example.relative_to(self.input)}"
            )
        lines += [
            f"note: {manifest.name} is in the folder; to use its captions build from {manifest}"
            for manifest in (self.input / f"metadata.{suffix}" for suffix in ("csv", "jsonl"))
            if manifest.is_file()
        ]
        return lines

    def read(self) -> Iterator[Row]:
        source = self._captions_from()
        for _, group in self._groups():
            if group.media:
                yield from self._rows(group, source)

    def _captions_from(self) -> str:
        if "{label}" not in self.caption_template:
            raise ConfigError(
                f"caption template '{self.caption_template}' does not say where the label goes; write for instance 'a photo of a {{label}}'"
            )
        head = [group for _, group in islice(self._groups(), _HEAD) if group.media]
        if self.captions_from == "folders" and head and all(path.parent == self.input for group in head for path in group.media):
            raise DataError(
                f"input {self.input}: its files lie in the folder itself, and only folders in there can be captions; sort the files into "
                f"folders named after what they show, or give the folder above as INPUT"
            )
        if self.captions_from != "auto":
            return self.captions_from
        if any(group.text or group.record for group in head):
            return "files"
        if any(path.parent != self.input for group in head for path in group.media):
            return "folders"
        raise DataError(
            f"input {self.input}: no captions found; put a .txt file beside each image or recording, sort them into folders named "
            f"after what they show, or build from a .csv or .jsonl file that lists files and captions"
        )

    def _what_there_is(self) -> str:
        suffixes = Counter(path.suffix or path.name for path in islice(visible_files(self.input), _HEAD))
        return (
            " (it has " + ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) + ")" if suffixes else "; it is empty"
        )

    def _groups(self) -> Iterator[tuple[Path, _Group]]:
        """Files of one folder that share their name up to the last dot, folder by folder."""
        for folder, names in walk_visible(self.input):
            groups: dict[str, _Group] = {}
            for name in names:
                groups.setdefault(name.rpartition(".")[0], _Group()).add(folder / name)
            yield from ((folder / stem, group) for stem, group in groups.items())

    def _rows(self, group: _Group, source: str) -> Iterator[Row]:
        captions, record, problem = self._by_folder(group.media[0]) if source == "folders" else _by_files(group)
        images = [path for path in group.media if is_image(path.name)]
        recordings = [path for path in group.media if is_speech(path.name)]
        pairs = (
            [(images[0], recordings[0])]
            if len(images) == len(recordings) == 1
            else [*((path, None) for path in images), *((None, path) for path in recordings)]
        )
        for image, speech in pairs:
            name = (image or speech).relative_to(self.input).as_posix()  # type: ignore[union-attr]
            yield Row(name, image, speech, captions, record, problem)

    def _by_folder(self, path: Path) -> tuple[tuple[str, ...], dict[str, Any], str]:
        if path.parent == self.input:
            return (), {}, "no caption: it lies in no folder of its own"
        return (self._caption(path),), {"label": _label(path)}, ""

    def _caption(self, path: Path) -> str:
        return self.caption_template.replace("{label}", _label(path))


class _Group:
    """Files that belong together."""

    def __init__(self) -> None:
        self.media: list[Path] = []
        self.text: Path | None = None
        self.record: Path | None = None

    def add(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if is_image(path.name) or is_speech(path.name):
            self.media.append(path)
        elif suffix == ".txt":
            self.text = path
        elif suffix == ".json":
            self.record = path


def _label(path: Path) -> str:
    return " ".join(path.parent.name.replace("_", " ").replace("-", " ").split())


def _by_files(group: _Group) -> tuple[tuple[str, ...], dict[str, Any], str]:
    """Captions, record and problem of a group."""
    record: dict[str, Any] = {}
    captions: tuple[str, ...] = ()
    try:
        if group.record:
            record = json.loads(group.record.read_text("utf-8-sig"))
            if not isinstance(record, dict):
                return (), {}, f"unreadable caption file: {group.record.name} holds no JSON object"
            captions = _captions_in(record)
        if group.text:
            captions = tuple(line for line in group.text.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError, RecursionError) as error:
        return (), {}, f"unreadable caption file: {error}"
    if not (group.text or group.record):
        return (), {}, "no caption: there is no .txt file beside it"
    return captions, record, ""


def _captions_in(record: dict[str, Any]) -> tuple[str, ...]:
    """Takes the captions out of a record."""
    for name in ("captions", "caption", "text", "transcript"):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return (value,)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(value)
    return ()
