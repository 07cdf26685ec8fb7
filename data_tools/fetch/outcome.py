"""Outcome: what came of an address."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What came of an address."""

    url: str
    reason: str = ""
    """One of a few, what failures are counted by; empty when it was fetched."""
    detail: str = ""
    again: bool = False
    """Whether another time may help."""
    pause_s: float = 0.0
    """How long the host asks to be left alone."""
    unreachable: bool = False
    """Whether the host was not even reached."""
    size: int = 0
    sha256: str = ""
