"""Describe a data set: counts, sizes, durations, captions, labels and duplicates, from its sidecars and records.

Media are not decoded; records are read by their offsets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from clipscale.data.shards import DatasetIndex, open_dataset, parse_sample
from clipscale.errors import ShardError

FIELDS = ("label", "intent", "speaker")
"""Fields of the record whose values are counted."""


@dataclass(frozen=True)
class Spread:
    """How a number is spread over the samples."""

    name: str
    unit: str
    values: np.ndarray

    def line(self) -> str:
        """Smallest, middle and largest value."""
        low, middle, high = (float(value) for value in np.quantile(self.values, [0, 0.5, 1]))
        if low == high:
            return f"{self.name}: always {low:,.4g} {self.unit}"
        return f"{self.name}: {low:,.4g} to {high:,.4g} {self.unit}, half of them at most {middle:,.4g}"


@dataclass
class Description:
    """What a data set holds."""

    url: str
    totals: dict[str, float]
    """samples, tar_bytes, images, recordings, captions, seconds."""
    shards: int
    spreads: list[Spread] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    fields: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in FIELDS})
    slots: Counter[str] = field(default_factory=Counter)
    """How often each slot is filled, by its name."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Keys of samples whose media are the same bytes, a list for each such medium."""

    def repeated_captions(self, most: int = 10) -> list[tuple[str, int]]:
        """Captions that come more than once, the most frequent first."""
        return [(caption, number) for caption, number in self.captions.most_common(most) if number > 1]

    def lines(self) -> list[str]:
        """The description as text."""
        return [*self._counts(), *(spread.line() for spread in self.spreads), *self._values(), *self._repetitions()]

    def _counts(self) -> list[str]:
        totals = self.totals
        lines = [f"{self.url}: {totals['samples']:,.0f} samples in {self.shards:,} shards, {totals['tar_bytes'] / 1e6:,.1f} MB"]
        if totals["images"]:
            lines.append(f"images: {totals['images']:,.0f}")
        if totals["recordings"]:
            lines.append(f"recordings: {totals['recordings']:,.0f}, {duration(totals['seconds'])} in all")
        return [*lines, f"captions: {totals['captions']:,.0f}, {len(self.captions):,} different"]

    def _values(self) -> Iterator[str]:
        for name, counts in self.fields.items():
            if counts:
                common = ", ".join(f"{value} ({number:,})" for value, number in counts.most_common(10))
                yield f"{name}: {len(counts):,} different: {common}{', ...' if len(counts) > 10 else ''}"
        if self.slots:
            yield "slots: " + ", ".join(f"{name} ({number:,})" for name, number in self.slots.most_common())

    def _repetitions(self) -> list[str]:
        extra = sum(len(keys) - 1 for keys in self.duplicates)
        lines = [f"duplicates: {extra:,} samples hold the same media as an earlier one"]
        lines += [f"  {' = '.join(keys[:6])}{' = ...' if len(keys) > 6 else ''}" for keys in self.duplicates[:5]]
        repeated = self.repeated_captions(5)
        return [*lines, *(["most frequent captions:"] if repeated else []), *(f"  {number:,} × {caption}" for caption, number in repeated)]


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def describe(url: str) -> Description:
    """Describe the data set at `url`.

    Raises:
        DataError: it cannot be opened.
        ShardError: a sidecar or a record in it cannot be read.
    """
    index = open_dataset(url)
    description = Description(str(url), index.totals, len(index.shards))
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("longer side", "recording length", "caption length", "captions")}
    first: dict[bytes, str] = {}
    repeated: dict[bytes, list[str]] = {}
    for shard in range(len(index.shards)):
        columns = index.sidecar(shard).columns
        _note_media(columns, numbers, first, repeated)
        words = [_note_record(description, captions, record) for captions, record in _records(index, shard)]
        numbers["caption length"].append(np.array([count for counts in words for count in counts]))
        numbers["captions"].append(columns["captions"])
    description.duplicates = [[first[digest], *keys] for digest, keys in repeated.items()]
    description.spreads = _spreads(numbers)
    return description


def _note_media(
    columns: dict[str, np.ndarray], numbers: dict[str, list[np.ndarray]], first: dict[bytes, str], repeated: dict[bytes, list[str]]
) -> None:
    longer = np.maximum(columns["width"], columns["height"])
    numbers["longer side"].append(longer[longer > 0])
    spoken = columns["frames"] > 0
    numbers["recording length"].append(columns["frames"][spoken] / columns["sample_rate"][spoken])
    for key, digest in zip(columns["key"], columns["sha256"], strict=True):
        if first.setdefault(digest, str(key)) != key:
            repeated.setdefault(digest, []).append(str(key))


def _note_record(description: Description, captions: Sequence[str], record: dict[str, Any]) -> list[int]:
    """Counts what the record holds; the captions' lengths in words."""
    description.captions.update(captions)
    for name, counts in description.fields.items():
        if isinstance(record.get(name), str | int):
            counts[str(record[name])] += 1
    if isinstance(record.get("slots"), dict):
        description.slots.update(list(record["slots"]))
    return [len(caption.split()) for caption in captions]


def _spreads(numbers: dict[str, list[np.ndarray]]) -> list[Spread]:
    units = {"longer side": "pixels", "recording length": "s", "caption length": "words", "captions": "a sample"}
    joined = {name: np.concatenate(parts) for name, parts in numbers.items()}
    return [Spread(name, units[name], values) for name, values in joined.items() if len(values)]


def _records(index: DatasetIndex, shard: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Captions and record of every sample of a shard."""
    columns = index.sidecar(shard).columns
    path = f"{index.url.rstrip('/')}/{index.shards[shard]}.tar"
    with fsspec.open(path, "rb") as file:
        for row, key in enumerate(columns["key"]):
            members = {}
            for member in ("text", "record"):
                size = int(columns[f"{member}_bytes"][row])
                file.seek(int(columns[f"{member}_offset"][row]))
                members[member] = file.read(size) if size else None
            try:
                sample = parse_sample(str(key), image=None, speech=None, **members)
            except (ShardError, json.JSONDecodeError) as error:
                raise ShardError(f"{path}: {error}; the shard is damaged: build the data set again") from error
            yield sample.captions, sample.record
