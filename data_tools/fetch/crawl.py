"""The crawl: the addresses of a plan, fetched shard by shard ahead of the jobs that pack them.

One process fetches, so that limits for each host hold over all of them; it keeps a shard or two ahead of the packing, so that little
is stored beside the shards. Addresses of several shards are under way at the same time: a slow host does not hold up the next shard.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Protocol, TypeVar, cast

from data_tools.fetch.fetcher import Fetcher, host_of
from data_tools.fetch.fetching import Fetching
from data_tools.fetch.outcome import Outcome
from data_tools.fetch.store import Fetched
from data_tools.fetch.turns import Turns
from data_tools.media import Address
from data_tools.plan import read_plan

_SPOOL_BYTES = 1 << 20  # of a body that are held in memory
_FIRST_PAUSE_S = 1.0  # before the second try; twice as long before each further one
_UNREACHED = 5  # addresses in a row at which a host was not reached: the others are not waited for
_LOOK_S = 0.2


class _Job(Protocol):
    @property
    def work(self) -> Path: ...
    @property
    def number(self) -> int: ...
    @property
    def group(self) -> int: ...


Job = TypeVar("Job", bound=_Job)


@dataclass(frozen=True)
class FetchCount:
    """What has been fetched so far."""

    fetched: int = 0
    failed: int = 0
    bytes: int = 0

    def line(self) -> str:
        """For people."""
        return f"fetched {self.fetched:,} of {self.fetched + self.failed:,}, {self.bytes / 1e6:,.1f} MB"


@dataclass
class _Shard:
    fetched: Fetched
    left: int


@dataclass
class _Task:
    shard: _Shard
    url: str
    tries: int = 0


def fetched_ahead(
    jobs: Iterable[Job],
    fetching: Fetching,
    *,
    stands: Callable[[Job], bool],
    show: Callable[[FetchCount], None],
    fetcher: Fetcher | None = None,
) -> Iterator[Job]:
    """The jobs, each when all its addresses have been asked for; those that stand already need none."""
    crawl = _Crawl(fetcher or Fetcher(fetching))
    try:
        yield from crawl.run(jobs, stands, show)
    finally:
        crawl.close()


class _Crawl:
    def __init__(self, fetcher: Fetcher) -> None:
        settings = fetcher.fetching
        self._fetcher, self._settings = fetcher, settings
        self._turns: Turns[_Task] = Turns(per_host=settings.per_host, interval_s=1 / settings.host_rate if settings.host_rate else 0.0)
        self._events: queue.SimpleQueue[_Task | BaseException] = queue.SimpleQueue()
        self._unreached: dict[str, int] = {}
        self._lock = threading.Lock()
        self._count = FetchCount()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="fetch") for _ in range(settings.threads)]
        for thread in self._threads:
            thread.start()

    def run(self, jobs: Iterable[Job], stands: Callable[[Job], bool], show: Callable[[FetchCount], None]) -> Iterator[Job]:
        begun: list[tuple[Job, _Shard | None]] = []
        source = iter(jobs)
        while True:
            while sum(shard.left for _, shard in begun if shard) < 2 * self._settings.threads and (job := next(source, None)) is not None:
                begun.append((job, None if stands(job) else self._begin(job)))
            for entry in [entry for entry in begun if entry[1] is None or entry[1].left == 0]:
                begun.remove(entry)
                if entry[1] is not None:
                    entry[1].fetched.close()
                yield entry[0]
            if begun:
                self._wait(show)
            elif job is None:
                show(self._count)
                return

    def _begin(self, job: Job) -> _Shard | None:
        """Queue the addresses of a shard that have not been asked for; None when it has none."""
        urls = dict.fromkeys(
            medium.url
            for row in read_plan(job.work / "plan.parquet", job.group)
            for medium in (row.image, row.speech)
            if isinstance(medium, Address) and not row.problem
        )
        if not urls:
            return None
        fetched = Fetched(job.work, job.number)
        wanted = [url for url in urls if url not in fetched]
        shard = _Shard(fetched, len(wanted))
        for url in wanted:
            if host := host_of(url):
                self._turns.add(host, _Task(shard, url))
            else:  # no host to be asked: it fails at once
                self._record(_Task(shard, url), self._fetcher.fetch(url, BytesIO()), BytesIO())
        return shard

    def _wait(self, show: Callable[[FetchCount], None]) -> None:
        """Until an address is done, or a moment has passed; what went wrong in a thread is raised here."""
        with suppress(queue.Empty):
            event = self._events.get(timeout=_LOOK_S)
            while True:
                if isinstance(event, BaseException):
                    raise event
                event.shard.left -= 1
                event = self._events.get_nowait()
        show(self._count)

    def _work(self) -> None:
        while (taken := self._turns.take()) is not None:
            host, task = taken
            try:
                self._do(host, task)
            except BaseException as error:  # a full disk, for one; the build must hear of it
                self._events.put(error)
                return
            finally:
                self._turns.done(host)

    def _do(self, host: str, task: _Task) -> None:
        with SpooledTemporaryFile(_SPOOL_BYTES, dir=str(task.shard.fetched.folder)) as body:
            file = cast(IO[bytes], body)
            task.tries += 1
            outcome = self._given_up(host, task.url) or self._fetcher.fetch(task.url, file)
            self._note_reached(host, outcome)
            if delay := self._fetcher.crawl_delay(task.url):
                self._turns.slow_down(host, min(delay, self._settings.longest_pause_s))
            if outcome.again and task.tries < self._settings.tries:
                pause_s = max(outcome.pause_s, _FIRST_PAUSE_S * 2 ** (task.tries - 1))
                self._turns.add(host, task, pause_s=pause_s)
                return
            self._record(task, outcome, file)

    def _record(self, task: _Task, outcome: Outcome, body: IO[bytes]) -> None:
        task.shard.fetched.add(outcome, body)
        with self._lock:
            done, size = not outcome.reason, outcome.size
            self._count = FetchCount(self._count.fetched + done, self._count.failed + (not done), self._count.bytes + size)
        self._events.put(task)

    def _given_up(self, host: str, url: str) -> Outcome | None:
        with self._lock:
            if self._unreached.get(host, 0) >= _UNREACHED:
                return Outcome(url, "host not reached", f"{host} was not reached {_UNREACHED} times in a row")
        return None

    def _note_reached(self, host: str, outcome: Outcome) -> None:
        with self._lock:
            if outcome.unreachable:
                self._unreached[host] = self._unreached.get(host, 0) + 1
            elif outcome.reason != "host not reached":
                self._unreached.pop(host, None)

    def close(self) -> None:
        self._turns.close()
        self._fetcher.close()
