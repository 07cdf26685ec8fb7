"""Turns: which address is fetched next, so that no host is asked too often or too much at once, and no host holds up the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Task = TypeVar("Task")


@dataclass
class _Host(Generic[Task]):
    waiting: deque[Task] = field(default_factory=deque)
    active: int = 0
    next_s: float = 0.0
    """When its next request may begin, by the monotonic clock."""
    interval_s: float = 0.0


class Turns(Generic[Task]):
    """Tasks of many hosts, given out in turn; safe to use from several threads."""

    def __init__(self, *, per_host: int, interval_s: float) -> None:
        self._per_host, self._interval_s = per_host, interval_s
        self._hosts: dict[str, _Host[Task]] = {}
        self._ready: deque[str] = deque()  # hosts with tasks, in the order in which their turn comes
        self._change = threading.Condition()
        self._closed = False

    def add(self, host: str, task: Task, *, first: bool = False, pause_s: float = 0.0) -> None:
        """Queue a task; `pause_s` holds back the whole host."""
        with self._change:
            state = self._hosts.setdefault(host, _Host(interval_s=self._interval_s))
            if not state.waiting:
                self._ready.append(host)
            (state.waiting.appendleft if first else state.waiting.append)(task)
            state.next_s = max(state.next_s, time.monotonic() + pause_s) if pause_s else state.next_s
            self._change.notify()

    def slow_down(self, host: str, interval_s: float) -> None:
        """Leave at least this many seconds between the host's requests."""
        with self._change:
            if host in self._hosts:
                self._hosts[host].interval_s = max(self._hosts[host].interval_s, interval_s)

    def take(self) -> tuple[str, Task] | None:
        """The next task whose host may be asked now, waiting for one; None when closed. `done` must follow."""
        with self._change:
            while not self._closed:
                now = time.monotonic()
                soonest = 1.0
                for _ in range(len(self._ready)):
                    host = self._ready.popleft()
                    state = self._hosts[host]
                    if state.active < self._per_host and state.next_s <= now:
                        task = state.waiting.popleft()
                        state.active, state.next_s = state.active + 1, now + state.interval_s
                        if state.waiting:
                            self._ready.append(host)
                        return host, task
                    self._ready.append(host)
                    if state.active < self._per_host:
                        soonest = min(soonest, state.next_s - now)
                self._change.wait(soonest)
            return None

    def done(self, host: str) -> None:
        """A task that was taken is over."""
        with self._change:
            state = self._hosts[host]
            state.active -= 1
            if not state.active and not state.waiting and state.next_s < time.monotonic():
                del self._hosts[host]  # millions of hosts must not stay in memory
            self._change.notify_all()

    def close(self) -> None:
        """Give out no more."""
        with self._change:
            self._closed = True
            self._change.notify_all()
