"""Finding: what a check found, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from clipscale.credentials import redacted

State = Literal["ok", "warning", "problem"]
_BY_BADNESS: tuple[State, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    """`warning`: a run works, but slower or less safely than it could; `problem`: some run will fail."""
    found: str
    advice: str = ""
    """What to do; empty when it is ok."""


def asked(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding; whatever stops the check itself is a problem too, and the other checks go on."""
    try:
        return check()
    except Exception as error:  # a doctor that dies of what it looks for would help nobody
        return Finding(name, "problem", redacted(f"{type(error).__name__}: {error}"), "see the message; nothing else was checked here")


def worst(findings: Sequence[Finding]) -> State:
    """The worst state of all."""
    return max((finding.state for finding in findings), key=_BY_BADNESS.index, default="ok")


def of_all_ranks(findings: Sequence[Finding]) -> Finding:
    """One check's findings of every rank, in rank order, as one: the worst, with the ranks it is from."""
    state = worst(findings)
    chosen = [(rank, finding) for rank, finding in enumerate(findings) if finding.state == state]
    texts = {finding.found: [rank for rank, other in chosen if other.found == finding.found] for _, finding in chosen}
    if len(texts) == 1 and len(chosen) == len(findings):
        return chosen[0][1]
    if state == "ok":
        return Finding(findings[0].name, "ok", f"{findings[0].found} (rank 0 of {len(findings)})")
    told = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items()]
    return Finding(chosen[0][1].name, state, "; ".join(told), chosen[0][1].advice)
