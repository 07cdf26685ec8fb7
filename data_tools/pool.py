"""Pool: run one function over many items in processes that never outlive their parent.

A process that dies ends the run with a message instead of a hang; killing the parent, even with -9, ends them all within
moments, so that a second run meets no leftovers of the first at work.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from clipscale.errors import RunError
from data_tools.tally import Progress, Tally

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_S = 0.2  # how often progress is shown
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES, _MAPPED_FROM_BYTES = 1 << 26, 1 << 24


Count = Callable[[Progress], None]
"""Adds to what has been done."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Item, Count], Result], items: Iterable[Item], *, workers: int, show: Callable[[Progress], None]
) -> Iterator[Result]:
    """`function(item, count)` for every item, in any order; `show` is told of progress a few times a second.

    Raises:
        RunError: a process died.
    """
    return _here(function, items, show) if workers <= 1 else _in_processes(function, items, workers, show)


def _here(function: Callable[[Item, Count], Result], items: Iterable[Item], show: Callable[[Progress], None]) -> Iterator[Result]:
    _keep_memory()
    totals, reasons, shown = [0, 0], Counter[str](), time.monotonic()

    def count(step: Progress) -> None:
        nonlocal shown
        totals[:] = [totals[0] + step.rows, totals[1] + step.bytes]
        reasons.update(step.reasons)
        if time.monotonic() - shown > _LOOK_S:
            shown = time.monotonic()
            show(Progress(totals[0], totals[1], dict(reasons)))

    for item in items:
        yield function(item, count)
    show(Progress(totals[0], totals[1], dict(reasons)))


def _in_processes(
    function: Callable[[Item, Count], Result], items: Iterable[Item], workers: int, show: Callable[[Progress], None]
) -> Iterator[Result]:
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit locks of pyarrow's threads
    context.set_forkserver_preload([function.__module__])
    tally = Tally(context)
    source, running = iter(items), set[Future[Result]]()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tally,)) as executor:
        try:
            while True:
                running |= {executor.submit(_call, function, item) for item in islice(source, 2 * workers - len(running))}
                if not running:
                    break
                done, running = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                show(tally.progress())
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed, perhaps for lack of memory; run the same command again, with fewer --workers"
            ) from None
        finally:
            tally.stop()
            executor.shutdown(wait=True, cancel_futures=True)


class _Stopped(Exception):
    """The parent does not want the result any more."""


_tally: Tally


def _start(tally: Tally) -> None:
    global _tally
    _tally = tally
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Let malloc keep up to 64 MB of freed memory: to give each picture's pages back and fault them in anew is a sixth of the work."""
    with suppress(OSError, AttributeError):  # other C libraries than glibc have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    with suppress(Exception):
        if parent is not None:
            parent.join()
    os._exit(1)


def _call(function: Callable[[Item, Count], Result], item: Item) -> Result:
    return function(item, _count)


def _count(step: Progress) -> None:
    if not _tally.add(step):
        raise _Stopped
