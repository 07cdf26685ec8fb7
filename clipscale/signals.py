"""Stop signals: SIGTERM, SIGINT and SIGUSR2 ask for a checkpoint and an orderly end."""

from __future__ import annotations

import signal
from types import FrameType

_ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """Remembers the first stop signal; the loop looks once a step. A scheduler may send it twice: once is enough."""

    def __init__(self) -> None:
        self.received = 0
        for number in _ASK_TO_STOP:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
