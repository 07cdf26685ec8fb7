"""The order of samples: a pure function of the seed, so that ranks, workers and restarts change nothing.

Every row of training has a number r, counted over all global batches. `Order` answers which sample it is:

1. Sources are mixed by weight with cumulative rounding (mix.py): after any number of rows each source has had its share, to
   within one row for every source listed before it and every change of the weights. Row r is the q-th row of its source.
2. Each source runs through exact epochs of its own: q // N is the epoch, q % N the place in it.
3. The epoch's shards, permuted, form a line of N samples, cut into L lanes. Places go round the lanes, and inside a
   lane through blocks that are permuted. A source of one block is one lane: permuted as a whole.
4. With length buckets, the rows of K global batches are regrouped by length and come as K batches in a permuted order.
5. The rows of a global batch stand in the order of their lanes, so a rank that takes a run of rows stays in few shards.

N samples, S sources, L lanes, B rows in a global batch. Random numbers are raw Philox output, which numpy keeps stable.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from clipscale.data.mix import Mix, Shares

BLOCK = 65_536
"""Samples that are permuted together."""
MAX_LANES = 16
"""Lanes of a source that has at least as many blocks: its rows come from a window of about a million samples."""


class Rows(NamedTuple):
    """Rows of a global batch, one array entry each."""

    source: np.ndarray
    """Place in `Order.names`."""
    epoch: np.ndarray
    """How often the source had been gone through before."""
    shard: np.ndarray
    place: np.ndarray
    """In the shard."""
    sample: np.ndarray
    """Number of the sample in its source, in stored order."""


class Start(NamedTuple):
    """Where an order begins that takes the place of another one."""

    batch: int
    """The first global batch of this order."""
    taken: Mapping[str, int]
    """Rows each source had had by then; none, for a source that is new."""


Lengths = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""How long the samples at these shards and places of a source are (its place in `Order.names` comes first), in any one unit."""


class SourceOrder:
    """One source's order: its q-th row for every q, epoch after epoch."""

    def __init__(self, name: str, sizes: np.ndarray, *, seed: int, lanes: int | None = None, block: int = BLOCK) -> None:
        self.sizes = sizes.astype(np.int64)
        self.num_samples = int(self.sizes.sum())
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.lanes = min(lanes or min(MAX_LANES, self.num_samples // block), self.num_samples) or 1
        self._key = f"{seed}/{name}"
        self._block = block
        self._lines: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def rows(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, lane, shard and place in the shard of the rows with these numbers in the source's own count."""
        epoch, place = np.divmod(q, self.num_samples)
        step, lane = np.divmod(place, self.lanes)
        position = np.empty_like(q)
        groups = np.stack([epoch, lane, step // self._block])
        for group in np.unique(groups, axis=1).T:
            chosen = (groups == group[:, None]).all(0)
            position[chosen] = self._permuted(*map(int, group))[step[chosen] % self._block]
        shard, index = np.empty_like(q), np.empty_like(q)
        for one in np.unique(epoch):
            chosen = epoch == one
            shard[chosen], index[chosen] = self._on_line(int(one), position[chosen])
        return epoch, lane, shard, index

    def _permuted(self, epoch: int, lane: int, block: int) -> np.ndarray:
        """Places on the line of one block, permuted."""
        key = (epoch, lane, block)
        if key not in self._blocks:
            short, longer = divmod(self.num_samples, self.lanes)  # the first `longer` lanes hold one more
            begin = lane * short + min(lane, longer) + block * self._block
            size = min(self._block, short + (lane < longer) - block * self._block)
            self._blocks[key] = (begin + permutation(f"{self._key}/block/{epoch}/{lane}/{block}", size)).astype(np.int64)
            if len(self._blocks) > 2 * self.lanes:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _on_line(self, epoch: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and place in it, of positions on the epoch's line."""
        if epoch not in self._lines:
            shards = permutation(f"{self._key}/shards/{epoch}", len(self.sizes))
            self._lines[epoch] = shards, np.concatenate([[0], np.cumsum(self.sizes[shards])])
            if len(self._lines) > 2:
                self._lines.popitem(last=False)
        shards, starts = self._lines[epoch]
        found = np.searchsorted(starts, position, side="right") - 1
        return shards[found], position - starts[found]


class Order:
    """Which samples make up every global batch of one pair kind."""

    def __init__(
        self,
        sizes: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        *,
        seed: int,
        global_batch: int,
        later_weights: Mapping[int, Mapping[str, float]] | None = None,
        lanes: int | None = None,
        block: int = BLOCK,
        bucket_batches: int = 1,
        lengths: Lengths | None = None,
        start: Start | None = None,
    ) -> None:
        """`sizes`: samples per shard, by source. `lanes` None: one for each block, at most `MAX_LANES`.

        `later_weights`: from which global batch on which sources have another weight. `bucket_batches` above 1 needs `lengths`.
        """
        assert bucket_batches == 1 or lengths is not None, "buckets are formed by length"
        self.names = list(sizes)
        self.global_batch = global_batch
        self._start = start or Start(0, {})
        self._shares = self._share_out(dict(weights), later_weights or {})
        self._sources = [SourceOrder(name, sizes[name], seed=seed, lanes=lanes, block=block) for name in self.names]
        self._bucket_batches, self._lengths, self._seed = bucket_batches, lengths, seed
        self._buckets: tuple[tuple[int, int, int], list[Rows]] | None = None

    def _share_out(self, weights: Mapping[str, float], later: Mapping[int, Mapping[str, float]]) -> Shares:
        """Stretches of rows between changes of the weights; those that were over before the start are left out."""
        stretches = {self._start.batch: weights}
        for batch, changed in sorted(later.items()):
            weights = {**weights, **changed}
            stretches[max(batch, self._start.batch)] = weights
        return Shares(
            begins=[batch * self.global_batch for batch in stretches],
            mixes=[Mix.of({name: weights[name] for name in self.names}) for weights in stretches.values()],
            taken=[self._start.taken.get(name, 0) for name in self.names],
        )

    def batch(self, number: int, *, rank: int = 0, world: int = 1) -> Rows:
        """This rank's rows of global batch `number`."""
        if self._bucket_batches == 1:
            drawn = self._drawn(number)
            return self._rows(drawn, _run_of(np.argsort(drawn.where, kind="stable"), rank, world))
        group, place = divmod(number - self._start.batch, self._bucket_batches)
        if self._buckets is None or self._buckets[0] != (group, rank, world):
            self._buckets = (group, rank, world), self._regrouped(group, rank=rank, world=world)
        return self._buckets[1][place]

    def _regrouped(self, group: int, *, rank: int, world: int) -> list[Rows]:
        """This rank's rows of the group's batches: its rows by length, cut into batches, which come in a permuted order."""
        assert self._lengths is not None
        first = self._start.batch + group * self._bucket_batches
        parts = [self._drawn(number) for number in range(first, first + self._bucket_batches)]
        drawn = _Drawn(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        length = np.empty(len(drawn.where), dtype=np.float32)
        for place in np.unique(drawn.source).tolist():
            mine = drawn.source == place
            length[mine] = self._lengths(place, drawn.shard[mine], drawn.place[mine])
        buckets = np.argsort(length, kind="stable").reshape(self._bucket_batches, self.global_batch)
        buckets = buckets[permutation(f"{self._seed}/buckets/{first}", self._bucket_batches)]
        return [self._rows(drawn, _run_of(bucket[np.lexsort((bucket, drawn.where[bucket]))], rank, world)) for bucket in buckets]

    def _drawn(self, number: int) -> _Drawn:
        """All rows of a global batch as the sources give them."""
        first = number * self.global_batch
        counts = self._shares.counts(np.arange(first, first + self.global_batch + 1, dtype=np.int64))
        parts = [self._part(place, own[0], own[-1]) for place, own in enumerate(counts) if own[-1] > own[0]]
        return _Drawn(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _part(self, place: int, begin: int, end: int) -> _Drawn:
        """One source's rows of a batch, by lane."""
        epoch, lane, shard, index = self._sources[place].rows(np.arange(begin, end, dtype=np.int64))
        by_lane = np.argsort(lane, kind="stable")
        size = end - begin
        columns = (column[by_lane].astype(np.int32) for column in (epoch, shard, index))
        return _Drawn(np.arange(0.5, size) / size, np.full(size, place, dtype=np.int32), *columns)

    def _rows(self, drawn: _Drawn, chosen: np.ndarray) -> Rows:
        source, epoch, shard, place = (column[chosen].astype(np.int64) for column in drawn[1:])
        starts = np.empty_like(place)
        for one in np.unique(source).tolist():
            starts[source == one] = self._sources[one].starts[shard[source == one]]
        return Rows(source, epoch, shard, place, starts + place)

    def taken(self, number: int) -> dict[str, int]:
        """Rows each source has had before global batch `number`; with buckets, exact where a group of them begins."""
        counts = self._shares.counts(np.array([number * self.global_batch], dtype=np.int64))[:, 0]
        return dict(zip(self.names, counts.tolist(), strict=True))

    def epochs(self, number: int) -> dict[str, float]:
        """How often each source has been gone through before global batch `number`."""
        taken = self.taken(number)
        return {name: taken[name] / source.num_samples for name, source in zip(self.names, self._sources, strict=True)}


class _Drawn(NamedTuple):
    """Rows as `Rows`, small, before they have an order."""

    where: np.ndarray
    """Where a row stands in its batch, 0 to 1: rows of one lane together, and every source all along, so that every rank gets of each."""
    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    place: np.ndarray


def _run_of(order: np.ndarray, rank: int, world: int) -> np.ndarray:
    """A rank's part of an order."""
    return order[len(order) * rank // world : len(order) * (rank + 1) // world]


def permutation(key: str, size: int) -> np.ndarray:
    """The permutation of `size` numbers that belongs to a key."""
    philox = np.random.Philox(key=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little"))
    return np.argsort(philox.random_raw(size), kind="stable")
