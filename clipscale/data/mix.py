"""How rows are shared out among sources: by weights, with cumulative rounding, through every change of the weights.

S sources, n numbers of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_LARGEST_WEIGHT = 1_000_000  # keeps 2 · rows · weight inside int64 for 10¹² rows


@dataclass(frozen=True)
class Mix:
    """Weights of the sources, and how many rows each has had."""

    weights: tuple[int, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mix:
        """Weights as whole numbers, exactly when they are short decimals; at least one is above zero."""
        exact = [Fraction(str(weight)) for weight in weights.values()]
        unit = Fraction(1, int(np.lcm.reduce([weight.denominator for weight in exact], dtype=object)))
        whole = [int(weight / unit) for weight in exact]
        divisor = int(np.gcd.reduce(whole, dtype=object))
        whole = [weight // divisor for weight in whole]
        if max(whole) > _LARGEST_WEIGHT:
            whole = [weight and max(1, round(weight * _LARGEST_WEIGHT / max(whole))) for weight in whole]
        return cls(tuple(whole))

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Rows of each source among the first `rows` rows, for an array of such numbers: [n] -> [S, n].

        Source after source takes its rounded share of what is left, so each count grows by one or stays.
        """
        counts, left, weight_left = [], rows, sum(self.weights)
        for weight in self.weights:
            share = (2 * left * weight + weight_left) // (2 * weight_left) if weight_left else left
            counts.append(share)
            left, weight_left = left - share, weight_left - weight
        return np.stack(counts)


@dataclass(frozen=True)
class Shares:
    """The mix of every stretch of rows, one after the other; rounding begins anew with each."""

    begins: Sequence[int]
    """The row each stretch begins at, rising."""
    mixes: Sequence[Mix]
    taken: Sequence[int]
    """Rows each source had had before the first stretch."""

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Rows of each source among the first `rows` rows, none of them before the first stretch: [n] -> [S, n]."""
        total = np.repeat(np.array(self.taken, dtype=np.int64)[:, None], len(rows), axis=1)
        ends = [*self.begins[1:], None]
        for begin, end, mix in zip(self.begins, ends, self.mixes, strict=True):
            inside = np.clip(rows - begin, 0, None if end is None else end - begin)
            if inside.any():
                total += mix.counts(inside)
        return total
