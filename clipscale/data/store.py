"""Store: a folder in any place that fsspec reaches, read by byte ranges; neighbours in one request, each request timed and tried again.

A range that comes short, long or not at all is asked for again. Whether the bytes are the right ones is for the reader's checksums to say.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from clipscale.credentials import filled_in, options_filled_in, redacted
from clipscale.errors import DataError, MissingPackage, ShardError
from clipscale.settings import Settings

OPEN_FILES = 64
"""Local files that a process keeps open for each store."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_NEVER_PASS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError, AttributeError)
_MAY_PASS = (408, 425, 429)  # of the 4xx answers of HTTP
_UNLISTED = ("http", "https")  # web servers have pages, not folders

Value = TypeVar("Value")
Span = tuple[int, int]
"""Offset and size in bytes."""


class Reading(Settings):
    """How a store is asked."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Longest that one request may take before it counts as failed. Local files are waited for."""
    tries: int = Field(default=5, ge=1, le=100)
    """How often a request, or a sample whose checksum was wrong, is tried in all."""
    pause_s: float = Field(default=0.1, ge=0)
    """Wait before the second try; it doubles with each further one, and differs between processes by up to a half."""
    connections: int = Field(default=16, ge=1)
    """Requests under way at a time in each process, where the store's client can have several."""
    gap_bytes: int = Field(default=65_536, ge=0)
    """Samples of a tar that lie closer than this are read in one request, with what lies between."""
    block_bytes: int = Field(default=16 << 20, ge=1)
    """Most that one request asks for, unless one sample is larger."""
    options: dict[str, Any] = {}
    """What the store's fsspec back-end is told besides the address: `{endpoint_url: "https://storage.example", key: "${ACCESS_KEY}",
    secret: "${SECRET_KEY}"}`. Secrets stand in environment variables; clipscale/credentials.py."""


class Garbled(ShardError):
    """Bytes came, and were not those that were written; another time may help."""


@dataclass(frozen=True)
class Block:
    """Neighbours that are read at once."""

    offset: int
    size: int
    places: list[int]
    """Which of the wanted spans lie in it."""


class Store:
    """A folder in a store. Safe to use in forked processes, which open it anew."""

    def __init__(self, url: str, *, reading: Reading | None = None, counters: dict[str, float] | None = None) -> None:
        """`counters` is counted in: `bytes` and `reads` that came, and `retries`.

        Raises:
            DataError: no address that is read.
            MissingPackage: its fsspec back-end is not installed.
        """
        self.url, self.reading = url, reading or Reading()
        self._counters = {} if counters is None else counters
        for name in ("bytes", "reads", "retries"):
            self._counters.setdefault(name, 0)
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._filesystem, self._root = open_filesystem(self.url, options=self.reading.options)
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    @property
    def _client(self) -> Any:
        if self._process != os.getpid():  # neither connections nor event loops survive a fork
            self._open()
        return self._filesystem

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self._filesystem, LocalFileSystem)

    def sizes(self) -> dict[str, int] | None:
        """Names and sizes of the folder's files; None where the store cannot list.

        Raises:
            DataError: there is no such folder, or it cannot be listed.
        """
        if self.url.partition("://")[0] in _UNLISTED:
            return None
        try:
            found = self._tried(self.url, lambda: self._asked("ls", self._root, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{self.url}: there is no such folder") from None
        if isinstance(found, ShardError):
            raise DataError(f"{self.url}: the folder cannot be listed: {found}")
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in found}

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: it cannot be read, after all tries.
        """
        return next(self.read_each([name]))

    def read_each(self, names: Iterable[str]) -> Iterator[bytes]:
        """Whole files in this order, several under way at a time; one that is gone or cannot be read raises as `read` does."""
        at_once, left, under_way = self._at_once(), iter(names), deque[Future[bytes | ShardError]]()
        try:
            while True:
                for name in itertools.islice(left, at_once - len(under_way)):
                    under_way.append(asyncio.run_coroutine_threadsafe(self._whole(name), self._loop()))
                if not under_way:
                    return
                found = under_way.popleft().result()
                if isinstance(found, ShardError):
                    raise found
                self._count(len(found))
                yield bytes(found)
        finally:
            for asked in under_way:
                asked.cancel()

    def _whole(self, name: str) -> Coroutine[Any, Any, bytes | ShardError]:
        return self._persist(f"{self.url}/{name}", lambda: self._asked("cat_file", f"{self._root}/{name}"))

    def ranges(self, name: str, spans: Sequence[Span]) -> list[bytes | ShardError]:
        """These bytes of a file; the error in place of those that cannot be read. Of a local file that was cut off, what there is."""
        if self.is_local:
            return self._local_ranges(name, spans)
        found: list[bytes | ShardError] = [b""] * len(spans)
        blocks = join(spans, gap_bytes=self.reading.gap_bytes, block_bytes=self.reading.block_bytes)
        for block, data in zip(blocks, self._blocks(name, [(block.offset, block.size) for block in blocks]), strict=True):
            for place in block.places:
                offset, size = spans[place]
                found[place] = data if isinstance(data, ShardError) else data[offset - block.offset :][:size]
        return found

    def fetch(self, name: str, size: int, write: Callable[[bytes], object]) -> None:
        """A whole file, in pieces, several at a time.

        Raises:
            ShardError: a piece cannot be read, after all tries.
        """
        step = self.reading.block_bytes
        pieces = [(offset, min(step, size - offset)) for offset in range(0, size, step)]
        for first in range(0, len(pieces), 4):
            for data in self._blocks(name, pieces[first : first + 4]):
                if isinstance(data, ShardError):
                    raise data
                write(data)

    def _blocks(self, name: str, spans: Sequence[Span]) -> list[bytes | ShardError]:
        path, where, at_once = f"{self._root}/{name}", f"{self.url}/{name}", self._at_once()

        async def gather() -> list[bytes | ShardError]:
            turn = asyncio.Semaphore(at_once)

            async def one(offset: int, size: int) -> bytes | ShardError:
                def fits(data: bytes) -> str:
                    came = f"{size:,} bytes from {offset:,} on were asked for, {len(data):,} came"
                    return "" if len(data) == size else f"{came}; the store must answer byte ranges"

                async with turn:
                    try:
                        found = await self._persist(where, lambda: self._asked("cat_file", path, start=offset, end=offset + size), fits)
                    except FileNotFoundError:
                        return _gone(where)
                if not isinstance(found, ShardError):
                    self._count(size)
                return found

            return await asyncio.gather(*(one(offset, size) for offset, size in spans))

        found: list[bytes | ShardError] = sync(self._loop(), gather)
        return found

    def _at_once(self) -> int:
        """Requests that a store's client may have under way: those that are not asynchronous may not be used by several threads."""
        return self.reading.connections if _is_async(self._client) or self.is_local else 1

    def _loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._client.loop if _is_async(self._client) else get_loop()
        return loop

    def _tried(self, what: str, ask: Callable[[], Awaitable[Value]]) -> Value | ShardError:
        found: Value | ShardError = sync(self._loop(), self._persist, what, ask)
        return found

    async def _asked(self, verb: str, *arguments: object, **options: object) -> Any:
        client = self._client
        if _is_async(client):
            return await getattr(client, f"_{verb}")(*arguments, **options)
        return await asyncio.to_thread(getattr(client, verb), *arguments, **options)

    async def _persist(
        self, what: str, ask: Callable[[], Awaitable[Value]], fits: Callable[[Value], str] = lambda _: ""
    ) -> Value | ShardError:
        """The answer, as soon as one fits; FileNotFoundError passes."""
        problem = ""
        for attempt in range(self.reading.tries):
            if attempt:
                self._counters["retries"] += 1
                await asyncio.sleep(self._pause(what, attempt))
            try:
                answer = await (ask() if self.is_local else asyncio.wait_for(ask(), self.reading.timeout_s))
            except (FileNotFoundError, NotADirectoryError):
                raise
            except TimeoutError as error:
                problem = redacted(str(error)) or f"no answer in {self.reading.timeout_s:g} s"
            except Exception as error:  # every store's client has errors of its own
                problem = redacted(f"{type(error).__name__}: {error}")
                if not _may_pass(error):
                    return ShardError(f"{what} cannot be read: {problem}")
            else:
                problem = fits(answer)
                if not problem:
                    return answer
        return ShardError(f"{what} cannot be read, after {self.reading.tries} tries: {problem}")

    def _pause(self, what: str, attempt: int) -> float:
        share = zlib.crc32(f"{what} {os.getpid()} {attempt}".encode()) / 2**32  # processes that failed together come back apart
        return self.reading.pause_s * 2.0 ** (attempt - 1) * (1 + share / 2)

    def _local_ranges(self, name: str, spans: Sequence[Span]) -> list[bytes | ShardError]:
        where = f"{self.url}/{name}"
        for attempt in range(self.reading.tries):
            if attempt:
                self._counters["retries"] += 1
                time.sleep(self._pause(where, attempt))
            try:
                descriptor = self._descriptor(name)
                found: list[bytes | ShardError] = [os.pread(descriptor, size, offset) for offset, size in spans]
                self._count(sum(size for _, size in spans), reads=len(spans))
                return found
            except FileNotFoundError:
                return [_gone(where)] * len(spans)
            except OSError as error:
                problem = ShardError(redacted(f"{where} cannot be read, after {self.reading.tries} tries: {error}"))
                self._forget(name)
        return [problem] * len(spans)

    def _descriptor(self, name: str) -> int:
        if self._process != os.getpid():
            self._open()
        if name not in self._descriptors:
            self._descriptors[name] = os.open(f"{self._root}/{name}", os.O_RDONLY)
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def _forget(self, name: str) -> None:
        """Open a file anew the next time: a handle of a network disk may have gone stale."""
        if name in self._descriptors:
            os.close(self._descriptors.pop(name))

    def _count(self, size: int, *, reads: int = 1) -> None:
        self._counters["bytes"] += size
        self._counters["reads"] += reads


def join(spans: Sequence[Span], *, gap_bytes: int, block_bytes: int) -> list[Block]:
    """Blocks of neighbouring spans, in the order in which they lie."""
    blocks: list[Block] = []
    for place in sorted(range(len(spans)), key=spans.__getitem__):
        offset, size = spans[place]
        if blocks:
            last = blocks[-1]
            end = max(last.offset + last.size, offset + size)
            if offset - (last.offset + last.size) <= gap_bytes and end - last.offset <= block_bytes:
                blocks[-1] = Block(last.offset, end - last.offset, [*last.places, place])
                continue
        blocks.append(Block(offset, size, [place]))
    return blocks


def open_filesystem(url: str, *, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """fsspec's client for an address, and the path in it; ${VARIABLES} in both are filled in here.

    Raises:
        DataError: no address that is read, or one of its variables is not set.
        MissingPackage: the back-end is not installed.
    """
    if url.startswith("pipe:"):
        raise DataError(
            f"{url}: pipe: addresses run shell commands and are refused; give a folder or an fsspec address such as s3://bucket/folder"
        )
    if "://" in url and ".." in url.split("/"):
        raise DataError(f"{url}: write the folder's address without '..'")
    try:
        filesystem, root = fsspec.core.url_to_fs(filled_in(url), **options_filled_in(options or {}))
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        raise MissingPackage(redacted(f"{url}: {error}") + (f"; pip install 'clipscale[{extra}]'" if extra else "")) from None
    except (ValueError, TypeError) as error:  # TypeError: an option that the back-end does not know
        raise DataError(redacted(f"{url}: {error}")) from None
    return filesystem, root.rstrip("/")


def _is_async(filesystem: Any) -> bool:
    return bool(getattr(filesystem, "async_impl", False))


def _may_pass(error: Exception) -> bool:
    """Whether another time may help."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS
    return not refused and not isinstance(error, _NEVER_PASS)


def _gone(where: str) -> ShardError:
    return ShardError(f"{where} is gone since the data set was opened")
