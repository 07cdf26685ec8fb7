"""Watchdog: a thread in every rank that notices when the rank gets no further, finds the one to blame, and ends the job.

Ranks that wait for a lost one in a collective cannot run Python in their main thread, and neither torch's timeout nor the launcher says
whom they wait for. These threads ask each other through files of the run folder (heartbeat.py), which all ranks must see. Time in which a
whole process does not run (a suspended machine) is not counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.watch.heartbeat import Heartbeat, started, take, write_whole
from clipscale.watch.verdict import judge, report

_POLL_S = 0.5
_ANSWER_S = 3.0
"""How long ranks may take to say where they stand."""


class Watchdog:
    """Watches inside `with`. One process is one rank; the thread ends the process with exit code 1 when the job hangs."""

    def __init__(self, folder: Path, mesh: Mesh, timer: PhaseTimer, *, step: Callable[[], int], limit_s: float, patient_s: float) -> None:
        """
        Args:
            folder: the run folder.
            step: the step in progress.
            limit_s: seconds without progress that are too many.
            patient_s: the same for the first step, which compiles and fills pipelines, and for checkpoints.
        """
        self._folder, self._mesh, self._timer, self._step = folder, mesh, timer, step
        self._limit_s, self._patient_s = limit_s, patient_s
        self._beats = folder / "heartbeats"
        self._first = step()
        self._beat_every_s = min(15.0, limit_s / 10)
        self._count = 0
        self._rank_0: Heartbeat | None = None
        self._rank_0_seen_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @staticmethod
    def clear(folder: Path) -> None:
        """Forget an earlier call's heartbeats; by one rank, before the others begin."""
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)

    def __enter__(self) -> Self:
        self._beats.mkdir(parents=True, exist_ok=True)  # a rank that does not see the run folder is found by its silence
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        poll_s = min(_POLL_S, self._limit_s / 10)
        progress, still_s, beat_s = None, 0.0, self._beat_every_s
        before = time.monotonic()
        while not self._over.wait(poll_s):
            now = time.monotonic()
            passed, before = min(now - before, 4 * poll_s), now
            own = (self._step(), self._timer.marks)
            still_s, progress = (still_s + passed, own) if own == progress else (0.0, own)
            beat_s += passed
            if beat_s >= self._beat_every_s:
                beat_s, self._count = 0.0, self._count + 1
                self._leave_behind(self._take(), self._path(self._mesh.rank))
            if self._timer.within("checkpoint"):
                self._look_at_rank_0()
            if (self._beats / "asked.json").exists():
                self._answer_and_end()
            if still_s >= self._patience():
                self._ask(still_s)

    def _patience(self) -> float:
        """While rank 0 writes a checkpoint, the others wait for it in a communication inside that phase."""
        waits_for_rank_0 = self._timer.within("checkpoint") and self._rank_0_writes()
        slow = self._step() <= self._first + 1 or self._timer.innermost == "checkpoint" or waits_for_rank_0
        return self._patient_s if slow else self._limit_s

    def _look_at_rank_0(self) -> None:
        if (found := Heartbeat.read(self._path(0))) != self._rank_0:
            self._rank_0, self._rank_0_seen_s = found, time.monotonic()

    def _rank_0_writes(self) -> bool:
        """Whether rank 0 says so, and has said something lately: one that is stopped meanwhile is not waited for."""
        lately = time.monotonic() - self._rank_0_seen_s < 3 * self._beat_every_s
        return self._rank_0 is not None and self._rank_0.phase == "checkpoint" and lately

    def _take(self, *, whole: bool = False) -> Heartbeat:
        return take(self._mesh.rank, step=self._step(), timer=self._timer, count=self._count, whole=whole)

    def _path(self, rank: int, kind: str = "") -> Path:
        return self._beats / f"rank-{rank:05d}{kind}.json"

    def _answer_and_end(self) -> NoReturn:
        """Another rank asks: say where this one stands, wait for the verdict, and end."""
        self._leave_behind(self._take(whole=True), self._path(self._mesh.rank, ".answer"))
        deadline = time.monotonic() + 3 * _ANSWER_S
        while not (self._beats / "verdict.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(1)

    def _ask(self, still_s: float) -> None:
        """Ask all ranks where they stand, tell what they say, and end; or answer the one that asked first."""
        try:
            (self._beats / "asked.json").touch(exist_ok=False)
        except FileExistsError:
            self._answer_and_end()
        except OSError as error:
            print(f"clipscale: other ranks cannot be asked: {error}", file=sys.stderr, flush=True)
        own = self._take(whole=True)
        self._leave_behind(own, self._path(self._mesh.rank, ".answer"))
        answers = {**self._await_answers(), self._mesh.rank: own}
        beats = {rank: Heartbeat.read(self._path(rank)) for rank in range(self._mesh.world)}
        verdict = judge(beats, answers)
        text = report(verdict, beats, answers, seconds=still_s)
        path = self._folder / "hangs" / f"step-{self._step():08d}.txt"
        print(f"clipscale: {text}\n\nclipscale: step {self._step()}: {verdict.why}; all stacks: {path}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk: it has been printed
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            write_whole(self._beats / "verdict.json", {"ranks": verdict.ranks, "why": verdict.why})
        for rank in verdict.ranks:
            _kill_sibling(beats[rank], answered=answers[rank] is not None)
        os._exit(1)

    def _leave_behind(self, beat: Heartbeat, path: Path) -> None:
        """On a full disk nothing: that is no reason to end, and the loop will say so."""
        with contextlib.suppress(OSError):
            beat.write(path)

    def _await_answers(self) -> dict[int, Heartbeat | None]:
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answers = {rank: Heartbeat.read(self._path(rank, ".answer")) for rank in range(self._mesh.world)}
            if None not in answers.values() or time.monotonic() > deadline:
                return answers
            time.sleep(0.05)


def _kill_sibling(beat: Heartbeat | None, *, answered: bool) -> None:
    """A rank that cannot end itself holds up the launcher; on this machine it can be ended."""
    if beat is None or answered or beat.host != socket.gethostname() or beat.pid == os.getpid():
        return
    if started(beat.pid) == beat.started:
        with contextlib.suppress(OSError):
            os.kill(beat.pid, signal.SIGKILL)
