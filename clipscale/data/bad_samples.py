"""Bad samples: counted by source and reason, and how many of them a run puts up with."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from clipscale.data.sample import BadSample
from clipscale.errors import ShardError

MOST_REASONS = 8
"""Reasons that are counted apart for each source; whatever else turns up is counted together."""
_LISTED = 10
_PARTICULARS = re.compile(r"\s*\([^()]*\)|\s*'[^']*'|\S*[/\\]\S*|\d[\d.,x×]*\s*")
_LONGEST = 80


def reason_class(reason: str) -> str:
    """A reason without what belongs to one sample: names, places, numbers, remarks."""
    plain = " ".join(_PARTICULARS.sub(" ", reason.replace("\n", " ")).replace(" ,", ",").split())
    return plain.strip(" :;,.")[:_LONGEST].strip() or "unknown"


class BadSampleBudget:
    """Counts bad samples, and ends a run that meets too many."""

    def __init__(self, *, max_fraction: float = 0.001, max_in_a_row: int = 100) -> None:
        self.max_fraction = max_fraction
        self.max_in_a_row = max_in_a_row
        self.seen = 0
        self.bad = 0
        self.reasons: dict[str, dict[str, int]] = {}
        """How many, by source and reason."""
        self._in_a_row = 0
        self._recent: deque[BadSample] = deque(maxlen=_LISTED)

    def count(self, valid: Sequence[bool], bad: Sequence[BadSample]) -> None:
        """Count one batch.

        Raises:
            ShardError: the budget is spent; the message lists what was wrong and where.
        """
        self.seen += len(valid)
        self.bad += len(bad)
        self._recent.extend(bad)
        for sample in bad:
            self._count_reason(sample)
        for good in valid:
            self._in_a_row = 0 if good else self._in_a_row + 1
            if self._in_a_row >= self.max_in_a_row:
                raise ShardError(f"{self._in_a_row} samples in a row could not be read{self._list()}")
        if self.bad > max(1.0, self.max_fraction * max(self.seen, 10_000)):
            raise ShardError(f"{self.bad} of {self.seen} samples could not be read; allowed are {self.max_fraction:.2%}{self._list()}")

    def _count_reason(self, sample: BadSample) -> None:
        reasons = self.reasons.setdefault(sample.source, {})
        reason = reason_class(sample.reason)
        if reason not in reasons and len(reasons) >= MOST_REASONS:
            reason = "other reasons"
        reasons[reason] = reasons.get(reason, 0) + 1

    def _list(self) -> str:
        counts = [f"\n  {source}: {count} × {reason}" for source, reasons in self.reasons.items() for reason, count in reasons.items()]
        latest = [f"\n  {item.source}{item.where and f', {item.where}'}: '{item.key}': {item.reason}" for item in self._recent]
        return f"; by source and reason:{''.join(counts)}\nthe latest:{''.join(latest)}"

    def state(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"seen": self.seen, "bad": self.bad, "in_a_row": self._in_a_row, "reasons": self.reasons}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.seen, self.bad, self._in_a_row = state["seen"], state["bad"], state["in_a_row"]
        self.reasons = {source: dict(reasons) for source, reasons in state["reasons"].items()}
