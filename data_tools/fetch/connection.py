"""Connections that go to checked addresses only, and end at their deadline whatever the other side does."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore2

from data_tools.fetch.addresses import Names, NoAnswer


class DeadlinePassed(Exception):
    """The time for an address is over."""


class Deadline:
    """A moment after which nothing is waited for."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end

    def within(self, timeout_s: float | None) -> float:
        """The timeout, or what is left when that is less.

        Raises:
            DeadlinePassed: nothing is left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlinePassed
        return left if timeout_s is None else min(left, timeout_s)


class CheckedBackend(httpcore2.NetworkBackend):
    """Resolves a name once, checks every address, and connects to one of those."""

    def __init__(self, names: Names, deadline: Deadline, *, network: httpcore2.NetworkBackend) -> None:
        self._names, self._deadline, self._network = names, deadline, network

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = self._names.addresses(host, timeout_s=self._deadline.within(timeout))[:3]
        failure: Exception = NoAnswer(f"{host} has no address")
        for address in addresses:
            try:
                stream = self._network.connect_tcp(address, port, self._deadline.within(timeout), local_address, socket_options)
                return _TimedStream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _TimedStream(httpcore2.NetworkStream):
    """A stream whose every wait ends at the deadline."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.within(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.within(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, self._deadline.within(timeout)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
