"""The order of samples: a pure function of the seed, so that ranks, workers and restarts change nothing.

Every row of training has a number r, counted over all global batches. `Order` answers which sample it is:

1. Sources are mixed by weight with cumulative rounding: after any number of rows each source has had its share, to
   within one row for every source listed before it. Row r is the q-th row of its source.
2. Each source runs through exact epochs of its own: q // N is the epoch, q % N the place in it.
3. The epoch's shards, permuted, form a line of N samples, cut into L lanes. Places go round the lanes, and inside a
   lane through blocks that are permuted. A source of one block is one lane: permuted as a whole.
4. The rows of a global batch stand in the order of their lanes, so a rank that takes a run of rows stays in few shards.

N samples, S sources, L lanes, B rows in a global batch. Random numbers are raw Philox output, which numpy keeps stable.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

BLOCK = 65_536
"""Samples that are permuted together."""
MAX_LANES = 16
"""Lanes of a source that has at least as many blocks: its rows come from a window of about a million samples."""
_LARGEST_WEIGHT = 1_000_000  # keeps 2 · rows · weight inside int64 for 10¹² rows


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


@dataclass(frozen=True)
class Mix:
    """Which source each row comes from, and how many rows each has had before."""

    weights: tuple[int, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mix:
        """Weights as whole numbers, exactly when they are short decimals."""
        exact = [Fraction(str(weight)) for weight in weights.values()]
        unit = Fraction(1, int(np.lcm.reduce([weight.denominator for weight in exact], dtype=object)))
        whole = [int(weight / unit) for weight in exact]
        divisor = int(np.gcd.reduce(whole, dtype=object))
        whole = [weight // divisor for weight in whole]
        if max(whole) > _LARGEST_WEIGHT:
            whole = [max(1, round(weight * _LARGEST_WEIGHT / max(whole))) for weight in whole]
        return cls(tuple(whole))

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Rows of each source among the first `rows` rows, for an array of such numbers: [n] -> [S, n].

        Source after source takes its rounded share of what is left, so each count grows by one or stays.
        """
        counts, left, weight_left = [], rows, sum(self.weights)
        for weight in self.weights:
            share = (2 * left * weight + weight_left) // (2 * weight_left)
            counts.append(share)
            left, weight_left = left - share, weight_left - weight
        return np.stack(counts)


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
        lanes: int | None = None,
        block: int = BLOCK,
    ) -> None:
        """`sizes`: samples per shard, by source. `lanes` None: one for each block, at most `MAX_LANES`."""
        self.names = list(sizes)
        self.global_batch = global_batch
        self._mix = Mix.of({name: weights[name] for name in self.names})
        self._sources = [SourceOrder(name, sizes[name], seed=seed, lanes=lanes, block=block) for name in self.names]

    def batch(self, number: int, *, rank: int = 0, world: int = 1) -> Rows:
        """This rank's rows of global batch `number`."""
        first = number * self.global_batch
        counts = self._mix.counts(np.arange(first, first + self.global_batch + 1, dtype=np.int64))
        source = np.argmax(np.diff(counts, axis=1), axis=0)
        parts = [self._part(place, counts[place]) for place in range(len(self.names)) if (source == place).any()]
        where, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        mine = np.argsort(where, kind="stable")[self.global_batch * rank // world : self.global_batch * (rank + 1) // world]
        return Rows(*(column[mine] for column in columns))

    def _part(self, place: int, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """One source's rows of a batch, by lane; first where each stands in the batch, so that every rank gets of every source."""
        source = self._sources[place]
        q = np.arange(counts[0], counts[-1], dtype=np.int64)
        epoch, lane, shard, index = source.rows(q)
        columns = (np.full_like(q, place), epoch, shard, index, source.starts[shard] + index)
        by_lane = np.argsort(lane, kind="stable")
        return (np.arange(0.5, len(q)) / len(q), *(column[by_lane] for column in columns))

    def epochs(self, number: int) -> dict[str, float]:
        """How often each source has been gone through before global batch `number`."""
        counts = self._mix.counts(np.array([number * self.global_batch], dtype=np.int64))[:, 0]
        return {name: float(count / source.num_samples) for name, count, source in zip(self.names, counts, self._sources, strict=True)}


def permutation(key: str, size: int) -> np.ndarray:
    """The permutation of `size` numbers that belongs to a key."""
    philox = np.random.Philox(key=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little"))
    return np.argsort(philox.random_raw(size), kind="stable")
