"""Stragglers: ranks that take longer than the others for work in which ranks do not wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median, median_low

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
        self._seconds: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in range(world)]
        self._in_a_row = [0] * world
        self._named = [False] * world

    def step(self, seconds: Sequence[float]) -> list[str]:
        """A sentence for every rank that has now become a straggler.

        Args:
            seconds: by rank, what it took for data, preparation and encoding.
        """
        for own, taken in zip(self._seconds, seconds, strict=True):
            own.append(taken)
        if len(self._seconds[0]) < _WINDOW:
            return []
        medians = [median(own) for own in self._seconds]
        usual = median_low(medians)
        return [self._sentence(rank, own, usual) for rank, own in enumerate(medians) if self._has_become_slow(rank, own, usual)]

    def _has_become_slow(self, rank: int, own: float, usual: float) -> bool:
        """Whether the rank is to be named now; it takes as many steps in a row to be called well again."""
        slow = own >= self._factor * usual and own - usual >= _LEAST_S
        self._in_a_row[rank] = self._in_a_row[rank] + 1 if slow != self._named[rank] else 0
        if self._in_a_row[rank] < _PATIENCE:
            return False
        self._named[rank], self._in_a_row[rank] = slow, 0
        return slow

    def _sentence(self, rank: int, own: float, usual: float) -> str:
        return (
            f"rank {rank} takes {own:.3g} s a step for data, preparation and encoding, {own / usual:.2f} times the usual {usual:.3g} s; "
            "all ranks wait for it"
        )
