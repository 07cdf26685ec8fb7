"""Near: all pairs of 64-bit hashes that differ in at most k bits, without comparing all pairs.

The 64 bits are cut into k + r bands. Two hashes that differ in at most k bits differ in at most k bands, so they agree in at least r:
looking at every choice of r bands, and comparing only hashes that agree in these, finds every such pair. That is exact, for any data.
More bands in a key (r) make smaller groups and more choices; r is the least for which a key has as many bits as there are hashes to tell
apart, log2(n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

_BITS = 64
_BLOCK = 1 << 22  # comparisons held at a time


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Pairs (i, j), i < j, of different hashes that differ in at most `distance` bits: int64 [pairs, 2], sorted, each once.

    Args:
        hashes: uint64 [n], no two the same.
        distance: 0 to 16.
    """
    found = [np.zeros((0, 2), np.int64)]
    if distance > 0 and len(hashes) > 1:
        for key in _keys(hashes, distance):
            found += _pairs_in_groups(hashes, key, distance)
    pairs = np.concatenate(found)
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def _keys(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """The bits of every choice of bands, others zeroed: uint64 [n] each."""
    chosen = next(r for r in range(1, 65) if r * _BITS / (distance + r) >= min(math.log2(len(hashes)), 40) or r == 4)
    edges = [round(_BITS * band / (distance + chosen)) for band in range(distance + chosen + 1)]
    masks = [((1 << (end - begin)) - 1) << begin for begin, end in pairwise(edges)]
    for bands in combinations(masks, chosen):
        yield hashes & np.uint64(sum(bands))


def _pairs_in_groups(hashes: np.ndarray, key: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Pairs among hashes with the same key: every place of the sorted keys against the one 1, 2, 3, ... behind it in its group."""
    order = np.argsort(key, kind="stable")
    keys = key[order]
    ends = np.searchsorted(keys, keys, side="right")  # of each one's group
    places = np.flatnonzero(ends - np.arange(len(keys)) > 1)
    step = 1
    while len(places):
        for begin in range(0, len(places), _BLOCK):
            left = order[places[begin : begin + _BLOCK]]
            right = order[places[begin : begin + _BLOCK] + step]
            close = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
            if close.any():
                yield np.sort(np.stack([left[close], right[close]], axis=1), axis=1)
        step += 1
        places = places[ends[places] - places > step]
