"""Signals: SIGTERM, SIGINT and SIGUSR2 ask for a checkpoint and the end, SIGUSR1 for a checkpoint; a dead launcher ends its ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent dies."""
_ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """Remembers the first stop signal; the loop looks once a step. A scheduler may send it twice: once is enough."""

    def __init__(self) -> None:
        self.received = 0
        for number in _ASK_TO_STOP:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number


class SaveSignal:
    """Remembers that SIGUSR1 came, until whoever asks says that it is done."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGUSR1, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True


def end_with_launcher() -> None:
    """A rank whose launcher is killed ends too, on Linux: an orphan would hold the run folder and its GPU."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
