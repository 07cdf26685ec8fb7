"""Heartbeats: how far every rank is, in files that ranks leave for each other in the run folder.

```text
heartbeats/rank-00003.json          how far it is and where its main thread stands; written now and then
heartbeats/asked.json               a rank got no further, and asks all where they stand
heartbeats/rank-00003.answer.json   the answer, with the stacks of all threads
heartbeats/verdict.json             who is to blame; all ranks end
```
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from clipscale.phases import PhaseTimer


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stood when it wrote this."""

    rank: int
    host: str
    pid: int
    started: int
    """When the process started, in the kernel's ticks: with the pid, nobody else's."""
    step: int
    marks: int
    """Beginnings and ends of phases in this step: how far in the step."""
    phase: str
    main_stack: list[str]
    """Of the main thread, outermost first."""
    count: int = 0
    """How many this rank has written: two in which nothing else differs are told apart."""
    stacks: str = ""
    """Of all threads, as text; in an answer."""

    @property
    def progress(self) -> tuple[int, int]:
        """What grows while a rank gets further."""
        return self.step, self.marks

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """None where there is none."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def take(rank: int, *, step: int, timer: PhaseTimer, count: int = 0, whole: bool = False) -> Heartbeat:
    """This rank's heartbeat now.

    Args:
        whole: with the stacks of all threads.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    stacks = {number: traceback.format_stack(frame) for number, frame in frames.items() if number != threading.get_ident()}
    told = [f"thread {names.get(number, number)}:\n{''.join(stack)}" for number, stack in stacks.items()] if whole else []
    return Heartbeat(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=started(os.getpid()),
        step=step,
        marks=timer.marks,
        phase=timer.innermost,
        main_stack=stacks.get(main or 0, []),
        count=count,
        stacks="\n".join(told),
    )


def started(pid: int) -> int:
    """When a process of this machine started (proc(5), stat, field 22); 0 where that is not known."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def state(pid: int) -> str:
    """A process of this machine as its kernel sees it: T is stopped, Z is dead, empty is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def write_whole(path: Path, content: object) -> None:
    """A JSON file that is never seen half written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside.write_text(json.dumps(content))
    aside.replace(path)
