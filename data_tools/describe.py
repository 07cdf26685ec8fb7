"""Describe a data set: counts, sizes, durations, captions, labels and duplicates, from its sidecars and records.

Media are not decoded; records are read by their offsets. Numbers are counted by value, texts and media by digest with files in the folder
for temporary files (occurrences.py), so memory does not grow with the data set, and every count is exact.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from clipscale.data.shards import DatasetIndex, Sample, open_dataset, parse_sample
from clipscale.errors import ShardError
from data_tools.occurrences import Counted, Occurrences, digest_of
from data_tools.tally import Progress

FIELDS = ("label", "intent", "speaker")
"""Fields of the record whose values are counted."""
_UNITS = {"longer side": "pixels", "recording length": "s", "caption length": "words", "captions": "a sample"}
_COMMON = 20  # values that are named
_CAPTION_BITS = 20  # a caption's place: its sample's number, and which of the sample's captions it is; readers refuse 1 MiB of them


@dataclass(frozen=True)
class Spread:
    """How a number is spread over the samples."""

    name: str
    unit: str
    values: np.ndarray
    """Every value that occurs, once, in order; recordings to the millisecond."""
    counts: np.ndarray
    """How often each does: int64."""

    @property
    def middle(self) -> float:
        """The median."""
        ends = np.cumsum(self.counts)
        below, above = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        return float(self.values[below] + self.values[above]) / 2

    def line(self) -> str:
        """Smallest, middle and largest value."""
        low, high = float(self.values[0]), float(self.values[-1])
        if low == high:
            return f"{self.name}: always {low:,.4g} {self.unit}"
        return f"{self.name}: {low:,.4g} to {high:,.4g} {self.unit}, half of them at most {self.middle:,.4g}"


@dataclass(frozen=True)
class Texts:
    """Texts that come, and how often."""

    distinct: int = 0
    common: list[tuple[str, int]] = field(default_factory=list)
    """The most frequent, first those that come most often."""


@dataclass(frozen=True)
class Duplicates:
    """Samples whose media are the same bytes."""

    extra: int = 0
    """Samples that hold the media of an earlier one."""
    groups: list[list[str]] = field(default_factory=list)
    """Keys of the first samples that share their media, a list for each of the first such media."""


@dataclass
class Description:
    """What a data set holds."""

    url: str
    totals: dict[str, float]
    """samples, tar_bytes, images, recordings, captions, seconds."""
    shards: int
    spreads: list[Spread] = field(default_factory=list)
    captions: Texts = field(default_factory=Texts)
    fields: dict[str, Texts] = field(default_factory=dict)
    slots: Counter[str] = field(default_factory=Counter)
    """How often each slot is filled, by its name."""
    duplicates: Duplicates = field(default_factory=Duplicates)

    def repeated_captions(self, most: int = 10) -> list[tuple[str, int]]:
        """Captions that come more than once, the most frequent first."""
        return [(caption, number) for caption, number in self.captions.common[:most] if number > 1]

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
        return [*lines, f"captions: {totals['captions']:,.0f}, {self.captions.distinct:,} different"]

    def _values(self) -> Iterator[str]:
        for name, texts in self.fields.items():
            if texts.distinct:
                common = ", ".join(f"{value} ({number:,})" for value, number in texts.common[:10])
                yield f"{name}: {texts.distinct:,} different: {common}{', ...' if texts.distinct > 10 else ''}"
        if self.slots:
            yield "slots: " + ", ".join(f"{name} ({number:,})" for name, number in self.slots.most_common())

    def _repetitions(self) -> list[str]:
        lines = [f"duplicates: {self.duplicates.extra:,} samples hold the same media as an earlier one"]
        lines += [f"  {' = '.join(keys[:6])}{' = ...' if len(keys) > 6 else ''}" for keys in self.duplicates.groups[:5]]
        repeated = self.repeated_captions(5)
        return [*lines, *(["most frequent captions:"] if repeated else []), *(f"  {number:,} × {caption}" for caption, number in repeated)]


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def describe(url: str, *, show: Callable[[Progress, int], None] | None = None) -> Description:
    """Describe the data set at `url`; `show` is told how many samples were looked at, and of how many.

    Raises:
        DataError: it cannot be opened.
        ShardError: a sidecar or a record in it cannot be read.
    """
    index = open_dataset(url)
    with tempfile.TemporaryDirectory(prefix="clipscale-describe-") as folder:
        counts = _Counts(Path(folder))
        for shard in range(len(index.shards)):
            counts.add_media(index.sidecar(shard).columns)
            for captions, record in _records(index, shard):
                counts.add_record(captions, record)
            if show:
                show(Progress(counts.samples), int(index.totals["samples"]))
        return _described(index, counts)


class _Counts:
    """What is counted on the way."""

    def __init__(self, folder: Path) -> None:
        self.samples = 0
        self.numbers: dict[str, Counter[float]] = {name: Counter() for name in _UNITS}
        self.media, self.captions = Occurrences(folder / "media"), Occurrences(folder / "captions")
        self.fields = {name: Occurrences(folder / name) for name in FIELDS}
        self.slots = Counter[str]()

    def add_media(self, columns: Mapping[str, np.ndarray]) -> None:
        """Count a shard's media; its records come next."""
        longer, spoken = np.maximum(columns["width"], columns["height"]), columns["frames"] > 0
        self._add_numbers("longer side", longer[longer > 0])
        self._add_numbers("recording length", np.round(columns["frames"][spoken] / columns["sample_rate"][spoken], 3))
        self._add_numbers("captions", columns["captions"])
        for place, digest in enumerate(columns["sha256"], start=self.samples):
            self.media.add(digest[:16], place)

    def _add_numbers(self, name: str, values: np.ndarray) -> None:
        found, counts = np.unique(values, return_counts=True)
        self.numbers[name].update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def add_record(self, captions: list[str], record: Mapping[str, Any]) -> None:
        """Count what a sample's texts hold."""
        for number, caption in enumerate(captions):
            self.captions.add(digest_of(caption), (self.samples << _CAPTION_BITS) + number)
            self.numbers["caption length"][len(caption.split())] += 1
        for name, values in self.fields.items():
            if isinstance(record.get(name), str | int):
                values.add(digest_of(str(record[name])), self.samples)
        if isinstance(record.get("slots"), dict):
            self.slots.update(list(record["slots"]))
        self.samples += 1


def _described(index: DatasetIndex, counts: _Counts) -> Description:
    media, captions = counts.media.counted(_COMMON), counts.captions.counted(_COMMON)
    fields = {name: values.counted(_COMMON) for name, values in counts.fields.items()}
    of_captions = [place >> _CAPTION_BITS for place, _ in captions.common]
    samples = _samples(index, [*of_captions, *(place for values in fields.values() for place, _ in values.common)])
    keys = _keys(index, [place for places in media.repeated for place in places])

    def texts(counted: Counted, text: Callable[[int], str]) -> Texts:
        return Texts(counted.distinct, [(text(place), number) for place, number in counted.common])

    return Description(
        index.url,
        index.totals,
        len(index.shards),
        spreads=[_spread(name, numbers) for name, numbers in counts.numbers.items() if numbers],
        captions=texts(captions, lambda place: samples[place >> _CAPTION_BITS].captions[place % (1 << _CAPTION_BITS)]),
        fields={name: texts(values, lambda place, name=name: str(samples[place].record[name])) for name, values in fields.items()},  # type: ignore[misc]
        slots=counts.slots,
        duplicates=Duplicates(media.repeats, [[keys[place] for place in places] for places in media.repeated]),
    )


def _spread(name: str, numbers: Counter[float]) -> Spread:
    values = sorted(numbers)
    return Spread(name, _UNITS[name], np.array(values), np.array([numbers[value] for value in values], np.int64))


def _samples(index: DatasetIndex, numbers: list[int]) -> dict[int, Sample]:
    """Samples by their numbers over all."""
    found: dict[int, Sample] = {}
    for number, shard, row in _where(index, numbers):
        sample = index.read(shard, [row])[0]
        if isinstance(sample, ShardError):
            raise sample
        found[number] = sample
    return found


def _keys(index: DatasetIndex, numbers: list[int]) -> dict[int, str]:
    return {number: str(index.sidecar(shard).columns["key"][row]) for number, shard, row in _where(index, numbers)}


def _where(index: DatasetIndex, numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    """Number, shard and row of samples, in order, so that each sidecar is read once."""
    ends = np.cumsum(index.samples)
    for number in sorted(set(numbers)):
        shard = int(np.searchsorted(ends, number, side="right"))
        yield number, shard, number - int(ends[shard] - index.samples[shard])


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
