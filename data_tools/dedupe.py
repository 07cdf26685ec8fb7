"""Dedupe: samples that hold the same as an earlier one, or nearly; and what training data share with an evaluation set.

A sample repeats another when its media are the same bytes, or when each of its media is nearly the other's: a picture whose 64 bits
differ in at most `distance`, a recording with the same decoded samples (data_tools/fingerprints.py). Of samples that repeat each other
the first is kept, in the order of data sets, shards and rows; one is left out only for a sample that is kept, so chains of small
changes do not swallow everything. A sample takes about 60 bytes of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipscale.data.shards import DatasetIndex, open_dataset
from data_tools.fingerprints import PrintJob, Prints, take_prints
from data_tools.near import near_pairs
from data_tools.pool import run_all, usable_cores
from data_tools.tally import Progress


@dataclass(frozen=True)
class Repeat:
    """A sample that repeats another."""

    dataset: str
    key: str
    of_dataset: str
    of_key: str
    how: str
    """`same bytes`, or `near` with the bits that differ."""
    place: int
    """Of its data set among those given: 0, 1, ..."""


@dataclass(frozen=True)
class Repeats:
    """What was found."""

    samples: int
    """Looked at, those of the evaluation sets left out."""
    same: int
    near: int
    unreadable: int


def dedupe(
    datasets: Sequence[str],
    *,
    found: Callable[[Repeat], None],
    against: Sequence[str] = (),
    distance: int = 4,
    workers: int | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> Repeats:
    """Find samples of `datasets` that repeat earlier ones; with `against`, those that repeat samples of these instead.

    Args:
        found: told of each, in order.
        distance: most bits in which near pictures differ, 0 to 16; -1 looks at bytes alone and decodes nothing.

    Raises:
        DataError: a data set cannot be opened.
    """
    urls = [*against, *datasets]  # evaluation sets first: they are what is kept
    indices = [open_dataset(url) for url in urls]
    prints = _all_prints(indices, near=distance >= 0, workers=workers, show=show)
    limit = sum(int(index.samples.sum()) for index in indices[: len(against)])
    kept = _repeats(prints, distance if distance >= 0 else None, limit)
    places = _Places(indices)
    same = near = 0
    for sample in np.flatnonzero(kept >= 0).tolist():
        bits = _how(prints, sample, int(kept[sample]))
        same, near = same + (bits is None), near + (bits is not None)
        (one, key), (other, of_key) = places.find(sample), places.find(int(kept[sample]))
        how = "same bytes" if bits is None else f"near, {bits} of 64 bits differ"
        found(Repeat(urls[one], key, urls[other], of_key, how, one - len(against)))
    return Repeats(len(kept) - limit, same, near, prints.unreadable)


def _all_prints(
    indices: Sequence[DatasetIndex], *, near: bool, workers: int | None, show: Callable[[Progress, int], None] | None
) -> Prints:
    jobs = [PrintJob(index.url, shard, near) for index in indices for shard in range(len(index.shards))]
    total = sum(int(index.samples.sum()) for index in indices)
    processes = min(workers or usable_cores(), len(jobs))
    results = run_all(take_prints, jobs, workers=processes, show=lambda progress: show(progress, total) if show else None)
    taken = {(url, shard): prints for url, shard, prints in results}
    parts = [taken[index.url, shard] for index in indices for shard in range(len(index.shards))]
    return Prints(
        np.concatenate([part.media for part in parts]),
        np.concatenate([part.picture for part in parts]),
        np.concatenate([part.has_picture for part in parts]),
        np.concatenate([part.sound for part in parts]),
        sum(part.unreadable for part in parts),
    )


def _repeats(prints: Prints, distance: int | None, limit: int) -> np.ndarray:
    """For each sample the kept one that it repeats, else -1: int64 [n].

    With a limit only samples before it are repeated, and only samples behind it repeat.
    """
    kept = np.full(len(prints.media), -1, np.int64)
    _first_of(_as_one(prints.media), np.arange(len(kept)), limit, kept)
    if distance is None:
        return kept
    has_sound = np.asarray(prints.sound.any(axis=1))
    silent = np.flatnonzero(~prints.has_picture & has_sound)
    _first_of(_as_one(prints.sound)[silent], silent, limit, kept)
    pictures = np.flatnonzero(prints.has_picture)
    for group in _by_sound(prints.sound, has_sound, pictures):
        _near_in(prints.picture, group, distance, limit, kept)
    return kept


def _as_one(halves: np.ndarray) -> np.ndarray:
    """uint64 [n, 2] as one value each, so that rows can be compared."""
    return np.ascontiguousarray(halves).view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)


def _first_of(values: np.ndarray, samples: np.ndarray, limit: int, kept: np.ndarray) -> None:
    """Samples with equal values repeat the first of them; `samples` are in order."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    origin = samples[first[inverse.reshape(-1)]]
    may = (kept[samples] < 0) & (origin != samples) & (kept[origin] < 0)
    may &= (origin < limit) & (samples >= limit) if limit else True
    kept[samples[may]] = origin[may]


def _by_sound(sound: np.ndarray, has_sound: np.ndarray, pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Samples with a picture: those without a recording together, the others by what is heard."""
    yield pictures[~has_sound[pictures]]
    heard = pictures[has_sound[pictures]]
    if len(heard):
        _, inverse = np.unique(_as_one(sound[heard]), return_inverse=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        groups = np.split(heard[order], np.flatnonzero(np.diff(inverse.reshape(-1)[order])) + 1)
        yield from (np.sort(group) for group in groups if len(group) > 1)


def _near_in(picture: np.ndarray, samples: np.ndarray, distance: int, limit: int, kept: np.ndarray) -> None:
    """Among these samples, in order: each that is near an earlier, kept one repeats it."""
    samples = samples[kept[samples] < 0]
    if limit:
        _near_across(picture, samples[samples < limit], samples[samples >= limit], distance, kept)
        return
    hashes, first, inverse = np.unique(picture[samples], return_index=True, return_inverse=True)
    order = np.argsort(first)  # in the order in which they come
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    pairs, origin = near_pairs(hashes[order], distance), np.arange(len(order))
    for earlier, later in pairs[np.lexsort(pairs.T)].tolist():
        if origin[earlier] == earlier and origin[later] == later:
            origin[later] = earlier
    origins = samples[first[order][origin[place[inverse.reshape(-1)]]]]
    repeats = origins != samples
    kept[samples[repeats]] = origins[repeats]


def _near_across(picture: np.ndarray, left: np.ndarray, right: np.ndarray, distance: int, kept: np.ndarray) -> None:
    """Each sample on the right that is near one on the left repeats the first such, one with the very same bits if there is one."""
    hashes, inverse = np.unique(picture[np.concatenate([left, right])], return_inverse=True)
    inverse, none = inverse.reshape(-1), len(picture)
    first = np.full(len(hashes), none)
    np.minimum.at(first, inverse[: len(left)], left)
    pairs, nearest = near_pairs(hashes, distance), np.full(len(hashes), none)
    np.minimum.at(nearest, pairs[:, 0], first[pairs[:, 1]])
    np.minimum.at(nearest, pairs[:, 1], first[pairs[:, 0]])
    origins = np.where(first < none, first, nearest)[inverse[len(left) :]]
    kept[right[origins < none]] = origins[origins < none]


def _how(prints: Prints, sample: int, origin: int) -> int | None:
    """Bits in which near pictures differ; None when the media are the same bytes."""
    if (prints.media[sample] == prints.media[origin]).all():
        return None
    if not (prints.has_picture[sample] and prints.has_picture[origin]):
        return 0
    return int(np.bitwise_count(prints.picture[sample] ^ prints.picture[origin]))


class _Places:
    """Which sample of which data set a number is."""

    def __init__(self, indices: Sequence[DatasetIndex]) -> None:
        self._indices = indices
        self._where = [(place, shard) for place, index in enumerate(indices) for shard in range(len(index.shards))]
        self._ends = np.cumsum([size for index in indices for size in index.samples.tolist()])

    def find(self, sample: int) -> tuple[int, str]:
        """The data set's place and the sample's key."""
        number = int(np.searchsorted(self._ends, sample, side="right"))
        place, shard = self._where[number]
        row = sample - int(self._ends[number] - self._indices[place].samples[shard])
        return place, str(self._indices[place].sidecar(shard).columns["key"][row])
