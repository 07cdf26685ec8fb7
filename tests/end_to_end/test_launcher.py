"""The launcher with ranks that do nothing but end: its exit code, and what signals do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, signal, sys, time
from clipscale.ending import Ending, EndingFiles, places
from clipscale.signals import StopSignals, end_with_launcher

end_with_launcher()
signals = StopSignals()
rank = int(os.environ["RANK"])
with EndingFiles(places(None, rank=-1, local_rank=rank)) as files:
    open(f"{sys.argv[2]}/{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").write(str(os.getpid()))
    if sys.argv[1] == "fail" and rank == 0:
        os._exit(2)
    while sys.argv[1] == "hang" or not signals.received:
        time.sleep(0.01)
    time.sleep(1)  # a checkpoint
    files.tell(Ending("stopped", step=1, signal=signals.received))
"""


class Launch:
    """The launcher of two ranks that do as told: `fail`, `wait` for a signal and end in order, or `hang`."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        options = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=1", "--shutdown-timeout=60"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clipscale.launcher", *options, str(folder / "rank.py"), what, str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )

    def wait_for_ranks(self) -> list[int]:
        """Their process ids, once they listen to signals."""
        deadline = time.monotonic() + 60
        while len(found := [path for path in self.folder.glob("?-0") if path.read_text()]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [int(path.read_text()) for path in found]

    def end(self) -> tuple[int, str]:
        """Exit code and what was said."""
        said = self.process.communicate(timeout=120)[1]
        return self.process.returncode, said


def alive(process: int) -> bool:
    """Whether a process still runs."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_launcher_ends_with_its_ranks_code_after_the_restarts(tmp_path: Path) -> None:
    status, said = Launch(tmp_path, "fail").end()
    assert status == 2
    assert "clipscale: rank 0 ended with exit code 2" in said
    assert {path.name for path in tmp_path.glob("0-?")} == {"0-0", "0-1"}
    assert not list(tmp_path.glob("clipscale-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_ranks_that_stopped_in_order_are_not_started_again_and_give_the_launcher_the_signal(tmp_path: Path, number: signal.Signals) -> None:
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # what the launcher inherits from launch/torchrun.sh
    launch = Launch(tmp_path, "wait")
    signal.signal(signal.SIGUSR2, handler)
    for process in [launch.process.pid, *launch.wait_for_ranks()]:  # as Slurm does: everybody, and the launcher more than once
        os.kill(process, number)
    for _ in range(2):
        time.sleep(0.2)  # two that come at the same time are one
        launch.process.send_signal(number)
    assert launch.end()[0] == 128 + number
    assert not list(tmp_path.glob("?-1"))


def test_the_same_signal_once_more_ends_everything_at_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "hang")
    ranks = launch.wait_for_ranks()
    launch.process.send_signal(signal.SIGINT)
    time.sleep(2.2)  # longer than an echo takes
    assert all(map(alive, ranks))
    launch.process.send_signal(signal.SIGINT)
    status, said = launch.end()
    assert status == -signal.SIGINT
    assert "SIGINT came again: ending at once" in said
    time.sleep(1)
    assert not any(map(alive, ranks))
