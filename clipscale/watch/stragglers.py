"""Stragglers: ranks that take longer than the others for work in which ranks do not wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_WINDOW = 20
"""Steps a rank is judged by; the median of so many is not moved by a slow one now and then."""
_PATIENCE = 10
"""Steps in a row that it must look slow."""
_LEAST_S = 0.002
"""Seconds that count: below this it is the clock and the scheduler."""


class Stragglers:
    """Is told every step's seconds of every rank; names a rank once, and again when it had recovered in between."""

    def __init__(self, factor: float, *, world: int) -> None:
        self._factor = factor
        self._seconds = np.zeros((_WINDOW, world))
        self._steps = 0
        self._in_a_row = np.zeros(world, dtype=np.int64)
        self._named = np.zeros(world, dtype=bool)

    def step(self, seconds: Sequence[float]) -> list[str]:
        """A sentence for every rank that has now become a straggler.

        Args:
            seconds: by rank, what it took for data, preparation and encoding.
        """
        self._seconds[self._steps % _WINDOW] = seconds
        self._steps += 1
        if self._steps < _WINDOW:
            return []
        medians = np.median(self._seconds, axis=0)
        usual = float(np.sort(medians)[(len(medians) - 1) // 2])  # the lower of the middle two: of two ranks, the faster
        return [self._sentence(int(rank), float(medians[rank]), usual) for rank in np.flatnonzero(self._have_become_slow(medians, usual))]

    def _have_become_slow(self, medians: np.ndarray, usual: float) -> np.ndarray:
        """Which ranks are to be named now; it takes as many steps in a row to be called well again."""
        slow = (medians >= self._factor * usual) & (medians - usual >= _LEAST_S)
        self._in_a_row = np.where(slow == self._named, 0, self._in_a_row + 1)
        turned = self._in_a_row >= _PATIENCE
        self._named, self._in_a_row = np.where(turned, slow, self._named), np.where(turned, 0, self._in_a_row)
        return turned & slow

    def _sentence(self, rank: int, own: float, usual: float) -> str:
        return (
            f"rank {rank} takes {own:.3g} s a step for data, preparation and encoding, {own / usual:.2f} times the usual {usual:.3g} s; "
            "all ranks wait for it"
        )
