"""Signals: what asks a run for a checkpoint and an orderly end, what hurries it, and how processes end with their parent."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from types import FrameType

LAUNCHER = "CLIPSCALE_LAUNCHER"
"""The environment variable that tells ranks their launcher's process id."""
ECHO_S = 2.0
"""The same signal within so many seconds is the first one's echo: Slurm signals a launcher and its ranks, and the launcher hands it on."""
_ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = 1_000
"""What a rank has heard when its time is over: no signal's number, and larger than all of them."""
_HURRY = (signal.SIGTERM, signal.SIGINT)
"""What people send again; schedulers repeat the others until they are heard."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent dies."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask for an end; not SIGHUP under nohup, which ignores it so that the run outlives its terminal."""
    return tuple(number for number in _ASK_TO_STOP if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


class Repeats:
    """Tells a second wish to end from the echo of the first."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._since_s = 0.0

    def hurries(self, number: int) -> bool:
        """Whether this signal is the first one's repetition by somebody who cannot wait."""
        if self.first is None:
            self.first, self._since_s = number, time.monotonic()
            return False
        return number == self.first and number in _HURRY and time.monotonic() - self._since_s > ECHO_S


class StopSignals:
    """Remembers the first stop signal; the loop looks once a step. The same Ctrl-C or SIGTERM once more ends the process at once."""

    def __init__(self, *, after_s: float | None = None) -> None:
        """
        Args:
            after_s: seconds from now after which time is up.
        """
        self._repeats = Repeats()
        self._until_s = math.inf if after_s is None else time.monotonic() + after_s
        for number in stop_signals():
            signal.signal(number, self._remember)

    @property
    def received(self) -> int:
        """The first stop signal's number, TIME_IS_UP, or 0 before any."""
        return self._repeats.first or (TIME_IS_UP if time.monotonic() >= self._until_s else 0)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self._repeats.hurries(number):
            leave_at_once(number)


def leave_at_once(number: int) -> None:
    """End this process without a checkpoint, because the signal came twice; exits as one that the signal killed."""
    name = signal.Signals(number).name
    os.write(2, f"clipscale: {name} came again: ending at once, the last checkpoint is what is kept\n".encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """A rank whose launcher is killed ends too, on Linux: an orphan would hold the run folder and its GPU."""
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """This process is killed when its parent, of this process id, dies; at once if it is dead already. Only Linux knows how."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_stop_signals() -> None:
    """For processes that work for a rank: schedulers signal whole process groups, and the rank itself decides when they end."""
    for number in _ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
