"""Tars: webdataset archives as img2dataset, open_clip, LAION and CLAP make them; a folder of them, one, or a pattern.

A sample is an image or recording, or both, with a `.txt` or `.json` of the same key. Its captions are the text and the
`captions` of the json; without either the json's `caption`, `text` or `transcript`. All else in the json is kept.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from clipscale.data.foreign_tars import Contents, ForeignSample, Member, expand_braces, looks_whole, read_contents, read_foreign_tar
from clipscale.errors import DataError
from data_tools.media import TarMember
from data_tools.rows import Row, Rows
from data_tools.rows._media import IMAGE_SUFFIXES, SPEECH_SUFFIXES, holds_tars, is_image, is_speech, is_tar, visible_files

_MEDIA = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES | SPEECH_SUFFIXES)
_TEXTS = frozenset({"txt", "json"})
_REMOTE = re.compile(r"pipe:|[a-z0-9+.-]{2,}:/", re.IGNORECASE)


class Tars(Rows):
    """Tars of webdataset, in the order of their names, or that of a pattern's braces."""

    damaged_tars: Literal["refuse", "keep"] = "refuse"
    """`keep` packs the samples before a tar's damage, except the last; the loss is one failed row a tar."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.exists():
            return holds_tars(path) if path.is_dir() else path.is_file() and is_tar(path.name)
        return ".tar" in str(path) and (_is_pattern(path) or bool(_REMOTE.match(str(path))))

    def guesses(self) -> list[str]:
        tars = self._tars()
        self._check_ends(tars)
        first, endings = self._first_with_media(tars)
        images, recordings = (sum(count for name, count in endings.items() if test(f".{name}")) for test in (is_image, is_speech))
        others = Counter({name: count for name, count in endings.items() if name not in _MEDIA | _TEXTS})
        return [
            f"tars: {len(tars):,}, {sum(path.stat().st_size for path in tars) / 1e6:,.1f} MB",
            f"images and recordings: {images:,} and {recordings:,} in {first.name}",
            f"captions: {endings['txt']:,} .txt and {endings['json']:,} .json in {first.name}; of a .json its captions, caption or text",
            *([f"not read: other members{_listed(others)}"] if others else []),
        ]

    def _first_with_media(self, tars: list[Path]) -> tuple[Path, Counter[str]]:
        """The first tar with an image or a recording, among ten, and what its members end in."""
        seen = Counter[str]()
        for path in tars[:10]:
            contents = read_contents(path)
            self._check(path, contents)
            endings = Counter(header.ending for header in contents.headers)
            if endings.keys() & _MEDIA:
                return path, endings
            seen += endings
        raise DataError(f"input {self.input}: no image and no recording in {tars[0].name} and those after it{_listed(seen)}")

    def read(self) -> Iterator[Row]:
        tars = self._tars()
        self._check_ends(tars)
        root = Path(os.path.commonpath([path.absolute().parent for path in tars]))
        for path in tars:
            contents = read_contents(path)
            self._check(path, contents)
            for sample in read_foreign_tar(path, contents, media=_MEDIA, texts=_TEXTS):
                yield from _rows(sample, path, path.absolute().relative_to(root).as_posix())

    def _tars(self) -> list[Path]:
        """The tars of the input; a DataError when there are none, or one that is named does not exist."""
        if self.input.is_dir():
            tars = [path for path in visible_files(self.input) if is_tar(path.name)]
        elif _REMOTE.match(str(self.input)) and not self.input.exists():
            raise DataError(f"input {self.input}: only tars on a disk of this machine are read; fetch them first, and give their folder")
        else:
            tars = self._expanded()
        if not tars:
            raise DataError(f"input {self.input}: there are no tars")
        missing = [str(path) for path in tars if not path.is_file()]
        if missing:
            raise DataError(f"input {self.input}: {len(missing)} of {len(tars)} tars are not there: {', '.join(missing[:3])}")
        return tars

    def _expanded(self) -> list[Path]:
        if self.input.exists():
            return [self.input]
        names: list[str] = []
        for name in expand_braces(str(self.input)):
            literal = Path(name).exists() or not has_magic(name)
            found = [name] if literal else sorted(glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            if not found:
                raise DataError(f"input {self.input}: no file is called {name}")
            names += found
        return [Path(name) for name in dict.fromkeys(names)]

    def _check_ends(self, tars: list[Path]) -> None:
        """Find those cut off without reading them."""
        try:
            cut = [path for path in tars if not looks_whole(path)]
        except OSError as error:
            raise DataError(f"input {self.input}: {error}") from error
        if cut and self.damaged_tars == "refuse":
            self._check(cut[0], read_contents(cut[0]), f" ({len(cut)} of {len(tars)} tars end like it)" if len(cut) > 1 else "")

    def _check(self, path: Path, contents: Contents, others: str = "") -> None:
        if contents.damage and self.damaged_tars == "refuse":
            raise DataError(
                f"input {self.input}: {path.name}: {contents.damage}{others}. Make it again, leave it out, "
                f"or pack what is before the damage with --damaged-tars keep"
            )


def _is_pattern(path: Path) -> bool:
    return "{" in str(path) or has_magic(str(path))


def _listed(endings: Counter[str]) -> str:
    """'; it has 3 .npy, 1 .pyd', most frequent first."""
    names = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    return "; it has " + ", ".join(f"{count:,} .{name}" for name, count in islice(names, 5)) if names else "; it has no files"


def _rows(sample: ForeignSample, tar: Path, tar_name: str) -> Iterator[Row]:
    """The row of a sample; one for each medium when it has several images or recordings."""
    name = f"{tar_name}:{sample.key.removeprefix('./')}".rstrip(":")
    if sample.problem:
        yield Row(name, problem=sample.problem)
        return
    captions, record, problem = _texts(sample.members)
    media = {suffix: _tar_member(member, tar) for suffix, member in sorted(sample.members.items()) if suffix in _MEDIA}
    images = [member for suffix, member in media.items() if is_image(f".{suffix}")]
    recordings = [member for suffix, member in media.items() if is_speech(f".{suffix}")]
    if not media:
        problem = f"no image or recording: the sample has only {', '.join(sorted(sample.members))}"
    if len(images) <= 1 and len(recordings) <= 1:
        yield Row(name, next(iter(images), None), next(iter(recordings), None), captions, record, problem)
        return
    yield from (Row(f"{tar_name}:{image.name}", image, None, captions, record, problem) for image in images)
    yield from (Row(f"{tar_name}:{speech.name}", None, speech, captions, record, problem) for speech in recordings)


def _tar_member(member: Member, tar: Path) -> TarMember:
    return TarMember(tar, member.name, member.offset, len(member.data), zlib.crc32(member.data))


def _texts(members: Mapping[str, Member]) -> tuple[tuple[str, ...], dict[str, Any], str]:
    """Captions, record and problem."""
    name, text = "", tuple[str, ...]()
    record: dict[str, Any] = {}
    try:
        if "json" in members:
            name = members["json"].name
            record = json.loads(members["json"].data.decode("utf-8-sig"), parse_constant=lambda _: None)
            if not isinstance(record, dict):
                return (), {}, f"unreadable caption file: {name} holds no JSON object"
        if "txt" in members:
            name = members["txt"].name
            text = _strings(members["txt"].data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return (), {}, f"unreadable caption file: {name}: {error}"
    if not members.keys() & _TEXTS:
        return (), {}, "no caption: it has neither a .txt nor a .json"
    captions = tuple(dict.fromkeys((*text, *_strings(record.get("captions")))))
    singles = (_strings(record.get(field)) for field in ("caption", "text", "transcript"))
    return captions or next(filter(None, singles), ()), record, ""


def _strings(value: Any) -> tuple[str, ...]:
    """A text or a list of texts, without empty ones."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text for text in texts if isinstance(text, str) and text.strip())
