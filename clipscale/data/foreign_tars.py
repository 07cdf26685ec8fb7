"""Foreign tars: webdataset archives that others made, read by webdataset and held to what the archive's own headers say.

webdataset 1.0 loses or mixes up samples without a word when a tar is cut off, when members of samples are interleaved, when
keys have dots or come twice. So a first pass over the headers alone (stdlib tarfile, nothing is read but 512 bytes a member)
says what must come out; webdataset is given one tar at a time, its samples are compared with that, and whatever differs is
a sample with a problem. Nothing is decoded, members of other kinds are not even read, and only open files are handed to
webdataset: its addresses can run programs (`pipe:`).
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clipscale.errors import DataError

_BLOCK = 512
_MOST_TARS = 1_000_000
_LARGEST_BYTES = 1 << 30
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and what stands for bytes that are not UTF-8


@dataclass(frozen=True)
class Header:
    """A file in a tar, as its header tells."""

    name: str
    key: str
    """What the members of one sample share: up to the first dot of the file's name, folders included."""
    suffix: str
    """The rest, in lower case: 'jpg', or 'seg.png'."""
    offset: int
    """Where its bytes begin in the tar."""
    size: int
    plain: bool
    """Its bytes lie there one after the other: neither a link nor sparse."""

    @property
    def ending(self) -> str:
        """What follows the last dot."""
        return self.suffix.rpartition(".")[2]


@dataclass(frozen=True)
class Contents:
    """The headers of a tar."""

    headers: list[Header]
    damage: str
    """Why samples are missing from the tar, with the place; empty when it is whole."""


@dataclass(frozen=True)
class Member:
    """One member of a sample."""

    name: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class ForeignSample:
    """A sample as webdataset gives it, or why there is none."""

    key: str
    members: Mapping[str, Member] = field(default_factory=dict)
    """By suffix."""
    problem: str = ""
    """'reason: detail'; empty when nothing is wrong."""


def expand_braces(pattern: str) -> list[str]:
    """'a{00..02}' as webdataset means it: ['a00', 'a01', 'a02'].

    Raises:
        DataError: the braces are not balanced, or stand for a million names or more.
    """
    from braceexpand import braceexpand

    try:
        names = list(islice(braceexpand(pattern), _MOST_TARS))
    except ValueError as error:
        raise DataError(f"input {pattern}: its braces are not balanced; write for instance 'tars/{{00000..00009}}.tar'") from error
    if len(names) == _MOST_TARS:
        raise DataError(f"input {pattern}: its braces stand for {_MOST_TARS:,} files or more; build in parts")
    return names


def looks_whole(path: Path) -> bool:
    """Whether a tar ends with zeros, as all do that were not cut off; a look at its last block only."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _BLOCK))
        return size >= _BLOCK and not any(file.read(_BLOCK))


def read_contents(path: Path) -> Contents:
    """All headers of a tar."""
    headers: list[Header] = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.size < 0:
                    return Contents(headers, f"the header at byte {info.offset:,} is damaged")  # Python 3.11 would go round in circles
                headers += _header(info, size)
            return Contents(headers, _damage(path, tar.offset))
    except tarfile.TarError as error:
        return Contents(headers, f"it cannot be read as an uncompressed tar to its end ({error}); it has {size:,} bytes")


def _header(info: tarfile.TarInfo, tar_bytes: int) -> list[Header]:
    """The header of a member that could belong to a sample; hidden files, files without suffix, folders and devices do not.

    Nor does one whose bytes were cut off.
    """
    folder, slash, base = info.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or not (info.isreg() or info.issym() or info.islnk()):
        return []
    plain = info.isreg() and info.sparse is None
    if plain and info.offset_data + info.size > tar_bytes:
        return []
    return [Header(info.name, folder + slash + stem, suffix.lower(), info.offset_data, info.size, plain)]


def _damage(path: Path, end: int) -> str:
    """What is wrong where the last member ends: there must be zeros, and nothing but zeros."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            return f"it is cut off: it ends at byte {end + len(block):,} without the zeros that every tar ends with"
        if any(block):
            return f"the header at byte {end:,} is damaged"
        while more := file.read(1 << 20):
            if any(more):
                return f"after the zeros at byte {end:,}, where tars end, more follows; are these several tars in one file?"
    return ""


def read_foreign_tar(path: Path, contents: Contents, *, media: Collection[str], texts: Collection[str]) -> Iterator[ForeignSample]:
    """The samples of the tar with these contents, in their order: the members whose suffix is in `media` or `texts`, without dots.

    Of a damaged tar the samples before the damage are given, except the last, which may have lost members: the damage is its problem.
    """
    groups = group_headers(contents, media=media, texts=texts)
    wanted = {header.name for group in groups if not group.problem for header in group.headers}
    samples = _webdataset_samples(path, wanted)
    sample = next(samples, None)
    for group in groups:
        if group.problem:
            yield ForeignSample(group.key, problem=group.problem)
        elif sample is not None and sample["__key__"] == group.key:
            yield _compared(group, sample)
            sample = next(samples, None)
        else:
            yield ForeignSample(group.key, problem=f"lost by webdataset: it does not give {group.headers[0].name}")


@dataclass
class Group:
    """The members of a sample, as their headers tell."""

    key: str
    headers: list[Header]
    problem: str = ""
    """'reason: detail', what keeps it from becoming a sample; empty when nothing does."""


def group_headers(contents: Contents, *, media: Collection[str], texts: Collection[str]) -> list[Group]:
    """The samples that a tar's headers tell of, in the order in which their keys come first.

    Before a tar's damage the last sample, which may have lost members, has the damage as its problem.
    """
    groups = _groups(contents.headers, media, texts)
    if not contents.damage:
        return groups
    last = groups[-1].key if groups else ""
    return [*groups[:-1], Group(last, [], f"damaged tar: {contents.damage}; this sample and all that followed are lost")]


def _groups(headers: list[Header], media: Collection[str], texts: Collection[str]) -> list[Group]:
    """Headers by key, in the order in which keys come first, each with what keeps it from becoming a sample."""
    positions: dict[str, list[int]] = {}
    known = [header for header in headers if header.ending in media or header.ending in texts]
    for position, header in enumerate(known):
        positions.setdefault(header.key, []).append(position)
    groups = []
    for key, places in positions.items():
        together = [known[place] for place in places]
        plain = [header for header in together if "." not in header.suffix]
        groups += [_dotted(header) for header in _samples_with_dots(together, plain, media, texts)]
        if plain:
            problem = _problem(plain, places)
            repeated = max(Counter(header.suffix for header in plain).values())
            groups += [Group(key, plain, problem)] * repeated
    return groups


def _problem(headers: list[Header], places: list[int]) -> str:
    """Why these members of one key are no sample."""
    suffixes = Counter(header.suffix for header in headers)
    twice = next((header.name for header in headers if suffixes[header.suffix] > 1), None)
    link = next((header.name for header in headers if not header.plain), None)
    large = next((header for header in headers if header.size > _LARGEST_BYTES), None)
    if _leaves(headers[0].name):
        return f"path that leaves the folder: {headers[0].name!r}; make the tar again with plain names"
    if _NO_TEXT.search(headers[0].name):
        return f"unusable name: {headers[0].name!r} is not UTF-8, or holds control characters"
    if twice:
        return f"duplicate key: the tar has more than one {twice}"
    if places[-1] - places[0] >= len(places):
        names = ", ".join(header.name for header in headers)
        return f"scattered sample: members of other samples lie between {names}; make the tar again, sorted by name"
    if link:
        return f"link in a tar: {link} is a link or a sparse file; make the tar again with tar --hard-dereference -h"
    if large:
        return f"unreadable file: {large.name} has {large.size:,} bytes, more than {_LARGEST_BYTES:,}"
    return ""


def _leaves(name: str) -> bool:
    """Whether a program that unpacks this name would write outside of the folder it was told."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def _samples_with_dots(together: list[Header], plain: list[Header], media: Collection[str], texts: Collection[str]) -> list[Header]:
    """Media that look like samples of their own, were it not for a dot in their keys: 'img.v2.0001.jpg'.

    Beside the plain media of a sample 'thumb.jpg' is an extra, unless it has a text of its own.
    """
    dotted = [header for header in together if "." in header.suffix]
    captioned = {header.suffix.rpartition(".")[0] for header in dotted if header.ending in texts}
    alone = not any(header.suffix in media for header in plain)
    return [header for header in dotted if header.ending in media and (alone or header.suffix.rpartition(".")[0] in captioned)]


def _dotted(header: Header) -> Group:
    problem = f"key with a dot: to webdataset {header.name} is member '{header.suffix}' of sample '{header.key}'; rename it without dots"
    return Group(header.name.rpartition(".")[0], [], problem)


def _compared(group: Group, sample: Mapping[str, Any]) -> ForeignSample:
    """webdataset's sample, when it is what the headers say."""
    members = {header.suffix: Member(header.name, header.offset, sample.get(header.suffix, b"")) for header in group.headers}
    given = {name: len(data) for name, data in sample.items() if not name.startswith("__")}
    if given != {header.suffix: header.size for header in group.headers}:
        return ForeignSample(group.key, problem=f"lost by webdataset: it gives {given} (bytes) for {group.headers[0].name}")
    return ForeignSample(group.key, members)


def _webdataset_samples(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """What webdataset makes of the members called so; it stops where the tar is damaged."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as file:
        source = [{"url": str(path), "stream": file}]
        files = tar_file_expander(source, handler=_stop_at_damage, select_files=wanted.__contains__)
        yield from group_by_keys(files)


def _stop_at_damage(error: Exception) -> bool:
    """webdataset's handlers return whether to go on; anything but damage, which `read_contents` reports, is raised."""
    if isinstance(error, tarfile.TarError):
        return False
    raise error
