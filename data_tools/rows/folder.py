"""Folder: images and recordings, with a text file beside each, or sorted into folders named after what they show.

`cat.jpg` + `cat.txt` (one caption a line), `a.wav` + `a.txt`, `a.jpg` + `a.wav` + `a.txt`; a `.json` beside them holds
further fields (label, intent, slots, speaker, ...), and captions when there is no `.txt`. Without such files, the folder
a file lies in is its label and its caption: `golden_retriever/17.jpg` is captioned 'golden retriever'.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from clipscale.errors import ConfigError, DataError
from data_tools.media import read_file
from data_tools.packing import BadRow
from data_tools.rows import Row, Rows
from data_tools.rows._media import IMAGE_SUFFIXES, SPEECH_SUFFIXES, file_suffix, holds_tars, visible_files, walk_visible

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
        images, recordings = sum(len(group.images) for group in head), sum(len(group.recordings) for group in head)
        if not images + recordings:
            raise DataError(f"input {self.input}: no image and no recording in it{self._what_there_is()}")
        source = self._captions_from()
        lines = [f"images and recordings: {images} and {recordings} among the first {images + recordings} files"]
        if source == "files":
            without = sum(not (group.text or group.record) for group in head if group.media)
            lines.append("captions: the .txt or .json file beside each" + (f"; {without} of them have none" if without else ""))
        else:
            example = next(group for group in head if group.media)
            path = (example.folder / example.media[0]).relative_to(self.input)
            lines.append(f"captions: the folder each lies in, for instance '{self._caption(example.folder)}' for {path}")
        lines += [
            f"note: {manifest.name} is in the folder; to use its captions build from {manifest}"
            for manifest in (self.input / f"metadata.{suffix}" for suffix in ("csv", "jsonl"))
            if manifest.is_file()
        ]
        return lines

    def read(self) -> Iterator[Row]:
        source = self._captions_from()
        for group in self._groups():
            if group.media:
                yield from self._rows(group, source)

    def _captions_from(self) -> str:
        if "{label}" not in self.caption_template:
            raise ConfigError(
                f"caption template '{self.caption_template}' does not say where the label goes; write for instance 'a photo of a {{label}}'"
            )
        head = [group for group in islice(self._groups(), _HEAD) if group.media]
        if self.captions_from == "folders" and head and all(group.folder == self.input for group in head):
            raise DataError(
                f"input {self.input}: its files lie in the folder itself, and only folders in there can be captions; sort the files into "
                f"folders named after what they show, or give the folder above as INPUT"
            )
        if self.captions_from != "auto":
            return self.captions_from
        if any(group.text or group.record for group in head):
            return "files"
        if any(group.folder != self.input for group in head):
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

    def _groups(self) -> Iterator[_Group]:
        """Files of one folder that share their name up to the last dot, folder by folder."""
        for folder, names in walk_visible(self.input):
            groups: dict[str, _Group] = {}
            for name in names:
                stem = name.rpartition(".")[0]
                if stem not in groups:
                    groups[stem] = _Group(folder)
                groups[stem].add(name)
            yield from groups.values()

    def _rows(self, group: _Group, source: str) -> Iterator[Row]:
        captions, record, problem = self._by_folder(group.folder) if source == "folders" else _by_files(group)
        pairs = (
            [(group.images[0], group.recordings[0])]
            if len(group.images) == len(group.recordings) == 1
            else [*((name, None) for name in group.images), *((None, name) for name in group.recordings)]
        )
        place = "" if group.folder == self.input else f"{group.folder.relative_to(self.input).as_posix()}/"
        for image, speech in pairs:
            media = [group.folder / name if name else None for name in (image, speech)]
            yield Row(f"{place}{image or speech}", media[0], media[1], captions, record, problem)

    def _by_folder(self, folder: Path) -> tuple[tuple[str, ...], dict[str, Any], str]:
        if folder == self.input:
            return (), {}, "no caption: it lies in no folder of its own"
        return (self._caption(folder),), {"label": _label(folder)}, ""

    def _caption(self, folder: Path) -> str:
        return self.caption_template.replace("{label}", _label(folder))


@dataclass(slots=True)
class _Group:
    """Names of files in a folder that belong together; no paths, since making millions of them takes longer than listing the folders."""

    folder: Path
    images: list[str] = field(default_factory=list)
    recordings: list[str] = field(default_factory=list)
    text: str = ""
    record: str = ""

    @property
    def media(self) -> list[str]:
        return self.images + self.recordings

    def add(self, name: str) -> None:
        suffix = file_suffix(name)
        if suffix in IMAGE_SUFFIXES:
            self.images.append(name)
        elif suffix in SPEECH_SUFFIXES:
            self.recordings.append(name)
        elif suffix == ".txt":
            self.text = name
        elif suffix == ".json":
            self.record = name


def _label(folder: Path) -> str:
    return " ".join(folder.name.replace("_", " ").replace("-", " ").split())


def _by_files(group: _Group) -> tuple[tuple[str, ...], dict[str, Any], str]:
    """Captions, record and problem of a group."""
    record: dict[str, Any] = {}
    captions: tuple[str, ...] = ()
    try:
        if group.record:
            record = json.loads(_text(group.folder, group.record))
            if not isinstance(record, dict):
                return (), {}, f"unreadable caption file: {group.record} holds no JSON object"
            captions = _captions_in(record)
        if group.text:
            captions = tuple(line for line in _text(group.folder, group.text).splitlines() if line.strip())
    except (OSError, ValueError, RecursionError, BadRow) as error:
        return (), {}, f"unreadable caption file: {error}"
    if not (group.text or group.record):
        return (), {}, "no caption: there is no .txt file beside it"
    return captions, record, ""


def _text(folder: Path, name: str) -> str:
    return read_file(os.path.join(folder, name)).decode("utf-8-sig")  # noqa: PTH118 (a third of the time of folder / name)


def _captions_in(record: dict[str, Any]) -> tuple[str, ...]:
    """Takes the captions out of a record."""
    for name in ("captions", "caption", "text", "transcript"):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return (value,)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(value)
    return ()
