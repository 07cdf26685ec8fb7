"""Rows of the sidecar for a tar as it is: where each sample lies, or why readers pass it over."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.data.foreign_tars import Contents, Group, group_headers
from clipscale.data.shards import media_columns, parse_sample
from clipscale.errors import ShardError
from data_tools.pool import Count
from data_tools.rows._media import IMAGE_SUFFIXES, SPEECH_SUFFIXES
from data_tools.summed import SummedFile
from data_tools.tally import Progress

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_SPEECH = frozenset(suffix.removeprefix(".") for suffix in SPEECH_SUFFIXES)
_TEXTS = frozenset({"txt", "json"})
_HEADER = 512
_LARGEST_BYTES = 1 << 30


@dataclass(frozen=True)
class TarRows:
    """What a tar holds."""

    rows: list[dict[str, Any]]
    """Of the sidecar, in the order in which samples begin, behind those that are no samples."""
    sha256: bytes
    """Of the tar."""
    bytes: int
    """That it has."""


def tar_rows(path: Path, contents: Contents, *, count: Count) -> TarRows:
    """Read a tar once."""
    groups = group_headers(contents, media=_IMAGES | _SPEECH, texts=_TEXTS)
    rows: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        tar = SummedFile(file)
        for group in sorted(groups, key=lambda group: group.headers[0].offset if group.headers and not group.problem else 0):
            row, before = _row(group, tar), tar.position
            rows.setdefault(row["key"], row)  # of a key that comes twice all are left out, once
            reasons = {} if row["status"] == "ok" else {row["status"].partition(": ")[0]: 1}
            count(Progress(1, tar.position - before, reasons))
        tar.finish()
    return TarRows(list(rows.values()), tar.digest(), tar.position)


def _row(group: Group, tar: SummedFile) -> dict[str, Any]:
    key = group.key.encode("utf-8", "backslashreplace").decode()
    try:
        if group.problem:
            raise _LeftOut(group.problem)
        return {**_sample(group, tar), "key": key, "status": "ok"}
    except _LeftOut as error:
        return {**media_columns(None, None), "key": key, "offset": 0, "bytes": 0, "crc32": 0, "captions": 0, "status": str(error)}


class _LeftOut(Exception):
    """'reason: detail' of a sample that readers pass over."""


def _sample(group: Group, tar: SummedFile) -> dict[str, Any]:
    places = {_member(header.suffix): header for header in group.headers}
    names = ", ".join(header.name for header in group.headers)
    empty = [header.name for header in group.headers if not header.size]
    if len(places) < len(group.headers):
        raise _LeftOut(f"several media: {names}; a sample has one image and one recording at most")
    if empty:
        raise _LeftOut(f"empty member: {empty[0]}")
    if not places.keys() & {"image", "speech"} or not places.keys() & {"text", "record"}:
        raise _LeftOut(f"missing partner: there is only {names}")
    start = min(header.offset for header in group.headers) - _HEADER
    end = max(header.offset + -(-header.size // _HEADER) * _HEADER for header in group.headers)
    if end - start > _LARGEST_BYTES:
        raise _LeftOut(f"too large: {names} and what lies between take {end - start:,} bytes")
    tar.skip_to(start)
    data = tar.read(end - start)
    members = {member: data[header.offset - start :][: header.size] for member, header in places.items()}
    lie = {f"{member}_{what}": value for member, header in places.items() for what, value in _place(header.offset, header.size)}
    try:
        row = media_columns(members.get("image"), members.get("speech"))
        texts = {name: members.get(name) for name in ("image", "speech", "text", "record")}
        captions = parse_sample(group.key, **texts).captions
    except ShardError as error:
        raise _LeftOut(f"unreadable sample: {error}") from error
    return {**row, **lie, "offset": start, "bytes": len(data), "crc32": zlib.crc32(data), "captions": len(captions)}


def _place(offset: int, size: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("offset", offset), ("bytes", size)


def _member(suffix: str) -> str:
    if suffix in _TEXTS:
        return "text" if suffix == "txt" else "record"
    return "image" if suffix in _IMAGES else "speech"
