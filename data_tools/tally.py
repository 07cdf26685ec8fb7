"""Tally: what several processes have done together: rows, bytes, and failures by reason.

Reasons are few but not known beforehand, so the shared memory holds a table of names and counts that fills as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext

_REASONS, _LETTERS = 32, 48
_OTHERS = "other reasons"


@dataclass(frozen=True)
class Progress:
    """What has been done so far."""

    rows: int = 0
    bytes: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many rows failed or were left out, by reason."""
    doing: str = ""
    """What else is under way."""

    @property
    def failed(self) -> int:
        """Of all reasons together."""
        return sum(self.reasons.values())


class Tally:
    """Counts that processes share; made before they start, and given to them as they do."""

    def __init__(self, context: BaseContext) -> None:
        self._totals = context.Array("q", 3)  # rows, bytes, and 1 when all shall stop; its lock holds for all
        self._names = context.Array("c", _REASONS * _LETTERS, lock=False)
        self._counts = context.Array("q", _REASONS, lock=False)

    def add(self, step: Progress) -> bool:
        """Count what was done; False when all shall stop."""
        with self._totals.get_lock():
            self._totals[0] += step.rows
            self._totals[1] += step.bytes
            for reason, number in step.reasons.items():
                self._counts[self._place(reason)] += number
            return not self._totals[2]

    def stop(self) -> None:
        """Let nobody begin anything more; without the lock, which a killed process may hold for ever. So `progress`."""
        self._totals.get_obj()[2] = 1

    def _place(self, reason: str) -> int:
        """Where a reason is counted; one that finds no room goes with the others that found none."""
        name = reason.encode()[: _LETTERS - 1].decode(errors="ignore")
        known = self._known()
        if name not in known and len(known) >= _REASONS - 1:
            name = _OTHERS
        if name not in known:
            begin = len(known) * _LETTERS
            self._names[begin : begin + _LETTERS] = name.encode().ljust(_LETTERS, b"\0")
            return len(known)
        return known.index(name)

    def _known(self) -> list[str]:
        names = bytes(self._names[:])
        slots = (names[begin : begin + _LETTERS].rstrip(b"\0").decode(errors="ignore") for begin in range(0, len(names), _LETTERS))
        return [name for name in slots if name]

    def progress(self) -> Progress:
        """What all processes have done so far."""
        rows, size = map(int, self._totals.get_obj()[:2])
        return Progress(rows, size, dict(zip(self._known(), self._counts[:], strict=False)))
