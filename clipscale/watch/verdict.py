"""The verdict on a run that gets no further: which rank the others wait for."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from clipscale.watch.heartbeat import Heartbeat, started, state

_STATES = {
    "T": "it is stopped (SIGSTOP)",
    "t": "a debugger holds it",
    "Z": "it is dead",
    "D": "it waits for a disk or a device",
    "": "it is gone",
}


@dataclass(frozen=True)
class Verdict:
    """Who is to blame, and why."""

    ranks: list[int]
    """None when all wait for each other."""
    why: str


def judge(beats: Mapping[int, Heartbeat | None], answers: Mapping[int, Heartbeat | None]) -> Verdict:
    """Find the rank that the others wait for.

    Args:
        beats: by rank, the last heartbeat, which may be older.
        answers: by rank, the answer to the question where it stands; None where there was none in time.
    """
    silent = [rank for rank, answer in answers.items() if answer is None]
    if silent:
        return Verdict(silent, "; ".join(_of_silent(rank, beats[rank]) for rank in silent))
    told = {rank: answer for rank, answer in answers.items() if answer is not None}
    furthest = max(answer.progress for answer in told.values())
    behind = [rank for rank, answer in told.items() if answer.progress < furthest]
    if behind:
        least = min(told[rank].progress for rank in behind)
        last = [rank for rank in behind if told[rank].progress == least]
        return Verdict(
            last, "; ".join(f"rank {rank} is behind the others, in phase {told[rank].phase} of step {told[rank].step}" for rank in last)
        )
    busy = [rank for rank, answer in told.items() if not _waits_in_torch(answer)]
    if busy and len(busy) < len(told):
        return Verdict(
            busy, "; ".join(f"rank {rank} does something else in phase {told[rank].phase} while the others wait in torch" for rank in busy)
        )
    if len(told) == 1:
        return Verdict([*told], f"the only rank gets no further in phase {told[0].phase}")
    return Verdict([], "all ranks stand at the same place: the network between them, or collectives that do not match; see the stacks")


def _of_silent(rank: int, beat: Heartbeat | None) -> str:
    if beat is None:
        return f"rank {rank} does not answer, and never wrote a heartbeat (does it see the run folder?)"
    where = f"rank {rank} (process {beat.pid} on {beat.host}) does not answer"
    if beat.host == socket.gethostname():
        same = started(beat.pid) == beat.started
        where += f": {_STATES.get(state(beat.pid) if same else '', 'it runs, and holds on to the interpreter')}"
    return f"{where}; last seen in phase {beat.phase} of step {beat.step}"


def _waits_in_torch(answer: Heartbeat) -> bool:
    return bool(answer.main_stack) and "/torch/" in answer.main_stack[-1].partition(", line")[0]


def report(verdict: Verdict, beats: Mapping[int, Heartbeat | None], answers: Mapping[int, Heartbeat | None], *, seconds: float) -> str:
    """The verdict, and the stacks of all ranks."""
    lines = [f"no rank got further for {seconds:.0f} s: {verdict.why}", ""]
    for rank in answers:
        seen = answers[rank] or beats[rank]
        if seen is None:
            lines += [f"=== rank {rank}: nothing known", ""]
            continue
        when = "now" if answers[rank] is not None else "when it last wrote a heartbeat"
        lines += [f"=== rank {rank} (process {seen.pid} on {seen.host}), step {seen.step}, phase {seen.phase}, {when}"]
        lines += [seen.stacks or "".join(seen.main_stack), ""]
    return "\n".join(lines)
