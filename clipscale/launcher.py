"""The launcher: torchrun, with an exit code that says what to do, deaf to a signal's echo, in a hurry at the second one.

`python -m clipscale.launcher` takes torchrun's arguments; launch/torchrun.sh calls it. torchrun alone ends with 1 whatever its ranks
ended with; restarts ranks (`--max-restarts`) that SIGUSR2 told to stop; and leaves the ranks' checkpoint unfinished when the signal that
ends it has two echoes (torch 2.12, SimpleElasticAgent.run: a second SignalException begins the wait for the ranks anew, a third leaves it).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from clipscale import ending
from clipscale.signals import LAUNCHER, Repeats, leave_at_once

_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AFTERWARDS_S = 10.0
"""How long ranks that have ended, or launchers of other nodes, are waited for once this node's ranks have written how they ended."""


def main(arguments: list[str]) -> NoReturn:
    """Run the ranks to their end, and exit as they did: 0, 1, 2, or 128 + n when signal n stopped them behind a checkpoint."""
    own = os.environ.get(ending.PLACE)
    folder = None if own else tempfile.mkdtemp(prefix="clipscale-")
    ended = Path(own or f"{folder}/ended.json")
    ended.unlink(missing_ok=True)
    os.environ.update({ending.PLACE: str(ended), LAUNCHER: str(os.getpid())})
    _catch_signals()
    threading.Thread(target=_outwait, args=(ended, folder), daemon=True).start()
    try:
        options = torchrun.parse_args(["--signals-to-handle", "SIGQUIT", *arguments])  # type: ignore[no-untyped-call]
        torchrun.run(options)  # type: ignore[no-untyped-call]
        status = _status(ended, otherwise=0)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"clipscale: rank {rank} {_describe(failure)}", file=sys.stderr)
        status = _status(ended, otherwise=max(1, failure.exitcode))
    except SignalException:
        status = _status(ended, otherwise=1)
    _leave(status, folder)


def _catch_signals() -> None:
    """The first signal ends torch's agent, which hands it to the ranks and waits for them; nohup's SIGHUP stays ignored."""
    repeats = Repeats()

    def end(number: int, _: FrameType | None) -> None:
        first = repeats.first is None
        if repeats.hurries(number):
            leave_at_once(number)  # the ranks are killed with this process
        if first:
            raise SignalException(f"got signal {number}", signal.Signals(number))

    for number in _ENDS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def _status(ended: Path, *, otherwise: int) -> int:
    """The exit code of what the ranks wrote; of ranks that failed or wrote nothing it is their own."""
    found = ending.read(ended)
    return otherwise if found is None or found.how == "failed" else found.exit_code


def _outwait(ended: Path, folder: str | None) -> None:
    """Leave soon after a stop: torch would wait five minutes for the launcher of another node that a signal has ended."""
    while (found := ending.read(ended)) is None or found.how != "stopped":
        time.sleep(1)
    time.sleep(_AFTERWARDS_S)
    _leave(found.exit_code, folder)


def _describe(failure: ProcessFailure) -> str:
    """How a rank ended."""
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}"


def _leave(status: int, folder: str | None) -> NoReturn:
    """End at once: torch's threads may still wait for others."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
