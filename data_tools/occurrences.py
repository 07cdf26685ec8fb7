"""Occurrences: how often each of very many values comes, and where first, in memory that does not grow with their number.

A value is its 16-byte digest, 40 bytes with its place and count. A million are held; then they are written to files by the digest's first
byte, in the folder for temporary files. In the end each file holds a 256th of all values, every one of them whole, and is counted alone.
Of a value that comes often only the first places and a count are kept, so that one value cannot fill a file. Exact but for two values
having the same 128-bit digest: one chance in 10^18 among a billion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8"), ("count", "<i8")])
_ONE = (1).to_bytes(8, "little")
_HELD = 1 << 20  # entries
PLACES = 8
"""Places of a value that are told."""


@dataclass(frozen=True)
class Counted:
    """What came."""

    distinct: int = 0
    repeats: int = 0
    """How many came that had come before."""
    common: list[tuple[int, int]] = field(default_factory=list)
    """First place and number of the most frequent values; of those as frequent, the earliest first."""
    repeated: list[list[int]] = field(default_factory=list)
    """The first places, at most PLACES, of the values that come more than once, the earliest first."""


def digest_of(text: str) -> bytes:
    """The digest that a text is counted by."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


class Occurrences:
    """Counts values."""

    def __init__(self, folder: Path) -> None:
        """`folder` is an own one, which may fill with up to 32 bytes a value."""
        folder.mkdir()
        self._folder, self._held = folder, bytearray()

    def add(self, digest: bytes, place: int) -> None:
        """Count a value (16 bytes) that comes at this place; places grow."""
        self._held += digest + place.to_bytes(8, "little") + _ONE
        if len(self._held) >= _HELD * _ENTRY.itemsize:
            self._spill()

    def _spill(self) -> None:
        entries = _first_places(np.frombuffer(bytes(self._held), _ENTRY))
        self._held = bytearray()
        part = (entries["high"] & np.uint64(255)).astype(np.uint8)
        for number in np.unique(part).tolist():
            with (self._folder / f"{number:03d}").open("ab") as file:
                file.write(entries[part == number].tobytes())

    def counted(self, most: int) -> Counted:
        """What came; `most` common and repeated values are named."""
        distinct = repeats = 0
        common: list[tuple[int, int]] = []
        repeated: list[list[int]] = []
        for entries in self._parts():
            starts, numbers = _groups(entries)
            first = entries["place"][starts]
            distinct, repeats = distinct + len(starts), repeats + int(numbers.sum()) - len(starts)
            best = np.lexsort((first, -numbers))[:most]
            common += zip(first[best].tolist(), numbers[best].tolist(), strict=True)
            common = sorted(common, key=lambda pair: (-pair[1], pair[0]))[:most]
            again = starts[numbers > 1]
            again = again[np.argsort(entries["place"][again])[:most]]
            repeated = sorted([*repeated, *(_places(entries, start) for start in again.tolist())])[:most]
        return Counted(distinct, repeats, common, repeated)

    def _parts(self) -> Iterator[np.ndarray]:
        """All entries of some values at a time, sorted by value and place."""
        files = sorted(self._folder.iterdir())
        if not files:
            yield from [_sorted(np.frombuffer(bytes(self._held), _ENTRY))] if self._held else []
            return
        if self._held:
            self._spill()
        for file in sorted(self._folder.iterdir()):
            yield _sorted(np.fromfile(file, _ENTRY))


def _sorted(entries: np.ndarray) -> np.ndarray:
    ordered: np.ndarray = entries[np.lexsort((entries["place"], entries["low"], entries["high"]))]
    return ordered


def _starts(entries: np.ndarray) -> np.ndarray:
    """Where each value begins among sorted entries."""
    changes = (entries["high"][1:] != entries["high"][:-1]) | (entries["low"][1:] != entries["low"][:-1])
    return np.concatenate([[0], np.flatnonzero(changes) + 1]).astype(np.int64)


def _groups(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value begins, and how often it came."""
    starts = _starts(entries)
    return starts, np.add.reduceat(entries["count"], starts)


def _first_places(entries: np.ndarray) -> np.ndarray:
    """The first entries of each value, the last of which counts those left out."""
    entries = _sorted(entries)
    starts, numbers = _groups(entries)
    sizes = np.diff(np.append(starts, len(entries)))
    rank = np.arange(len(entries)) - np.repeat(starts, sizes)
    kept: np.ndarray = entries[rank < PLACES].copy()
    ends = np.cumsum(np.minimum(sizes, PLACES)) - 1
    kept["count"][ends] += numbers - np.add.reduceat(kept["count"], np.concatenate([[0], ends[:-1] + 1]))
    return kept


def _places(entries: np.ndarray, start: int) -> list[int]:
    same = entries[start : start + PLACES]
    same = same[(same["high"] == same["high"][0]) & (same["low"] == same["low"][0])]
    return [int(place) for place in same["place"]]
