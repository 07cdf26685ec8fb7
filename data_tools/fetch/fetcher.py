"""The fetcher: one address, asked for as a careful and polite visitor would.

http and https only; every hop, redirects included, goes through the same checks: the host's addresses, its robots.txt, the size and
kind of what it sends. A body is never decompressed and never believed to be what its header says.
"""

from __future__ import annotations

import email.utils
import hashlib
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import IO
from urllib.parse import quote, urljoin, urlsplit

import h11
import httpcore2

from data_tools.fetch.addresses import Names, NoAnswer, Refused, plain_host
from data_tools.fetch.connection import CheckedBackend, Deadline, DeadlinePassed
from data_tools.fetch.fetching import Fetching
from data_tools.fetch.opt_out import Robots, Rules, reserved_by
from data_tools.fetch.outcome import Outcome
from data_tools.fetch.sniff import HEAD_BYTES, kind_of

MAX_REDIRECTS = 5
_MAX_URL = 8_192
_MAX_ROBOTS_BYTES = 500_000  # RFC 9309 asks for at least this much
_ROBOTS_S = 30.0  # longest time for a robots.txt
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429, 500, 502, 503, 504)
_CUT = {
    "without sending complete message body": "cut off",
    "incomplete chunked": "cut off",
    "disconnected without": "broken connection",
}
"""How httpcore tells that the other side went away."""
_SAFE = "/:?#[]@!$&'()*+,;=%~-._"  # what stays as it is in an address; everything else is percent-encoded
_PORTS = (80, 443)


@dataclass(frozen=True)
class _Hop:
    """A request: where to, in parts that nothing parses a second time."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def url(self) -> str:
        """As robots.txt and redirects see it."""
        return f"{self.origin}{self.target}"

    def to(self) -> httpcore2.URL:
        """As httpcore wants it."""
        return httpcore2.URL(scheme=self.scheme, host=self.host, port=self.port, target=self.target)


class _Failed(Exception):
    def __init__(self, reason: str, detail: str, *, again: bool = False, pause_s: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.again, self.pause_s, self.unreachable = reason, detail, again, pause_s, unreachable


def host_of(url: str) -> str:
    """What an address is queued by: its host and port."""
    try:
        return _hop(url).origin
    except _Failed:
        return ""


class Fetcher:
    """Fetches addresses; safe to use from several threads."""

    def __init__(
        self,
        fetching: Fetching,
        *,
        names: Names | None = None,
        network: httpcore2.NetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` says which certificates are believed; those of the system unless given."""
        self.fetching = fetching
        self._names = names or Names(allow_loopback=fetching.allow_loopback)
        self._network = network or httpcore2.SyncBackend()
        self._robots = Robots(fetching.user_agent, self._read_robots)
        self._tls = tls or httpcore2.default_ssl_context()

    def close(self) -> None:
        """Stop looking up names."""
        self._names.close()

    def crawl_delay(self, url: str) -> float:
        """Seconds between requests that the host's robots.txt asks for, once that has been read; else 0."""
        return self._robots.crawl_delay(host_of(url))

    def fetch(self, url: str, body: IO[bytes]) -> Outcome:
        """Ask for the address once, and write what it sends into `body`."""
        deadline = Deadline(self.fetching.deadline_s)
        try:
            size, sha256 = self._follow(url, body, deadline)
            return Outcome(url, size=size, sha256=sha256)
        except _Failed as error:
            return Outcome(url, error.reason, error.detail, error.again, error.pause_s, error.unreachable)

    def _follow(self, url: str, body: IO[bytes], deadline: Deadline) -> tuple[int, str]:
        for _ in range(MAX_REDIRECTS + 1):
            hop = _hop(url)
            if not self.fetching.ignore_robots:
                self._ask_robots(hop, deadline)
            with self._sent(hop, deadline) as response:
                if response.status not in _REDIRECTS:
                    return self._receive(response, body)
                url = _redirect(url, response)
        raise _Failed("too many redirects", f"more than {MAX_REDIRECTS}, the last to {url[:200]}")

    @contextmanager
    def _sent(self, hop: _Hop, deadline: Deadline) -> Iterator[httpcore2.Response]:
        """A request, answered; one connection each, so that nothing of one answer can reach another."""
        timeouts = {"connect": self.fetching.connect_timeout_s, "read": self.fetching.read_timeout_s, "write": self.fetching.read_timeout_s}
        headers: dict[bytes | str, bytes | str] = {
            "Host": hop.origin.partition("://")[2] if hop.port not in _PORTS else hop.origin.partition("://")[2].rpartition(":")[0],
            "User-Agent": self.fetching.user_agent,
            "Accept": "image/*, audio/*, */*;q=0.1",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        origin = httpcore2.Origin(hop.scheme.encode(), hop.host.encode(), hop.port)
        backend = CheckedBackend(self._names, deadline, network=self._network)
        try:
            with (
                httpcore2.HTTPConnection(origin, ssl_context=self._tls, network_backend=backend) as connection,
                connection.stream("GET", hop.to(), headers=headers, extensions={"timeout": timeouts}) as response,
            ):
                yield response
        except Refused as error:
            raise _Failed("forbidden address", str(error)) from error
        except NoAnswer as error:
            raise _Failed("host not found", str(error), again=True, unreachable=True) from error
        except DeadlinePassed:
            raise self._too_slow(hop) from None
        except (httpcore2.ConnectTimeout, httpcore2.ConnectError) as error:
            if deadline.passed:
                raise self._too_slow(hop) from None
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise _Failed("bad certificate", f"{hop.origin}: {error.__cause__.verify_message}") from error
            raise _Failed("no connection", f"{hop.origin}: {error or type(error).__name__}", again=True, unreachable=True) from error
        except (httpcore2.ReadTimeout, httpcore2.WriteTimeout):
            if deadline.passed:
                raise self._too_slow(hop) from None
            raise _Failed("timeout", f"{hop.origin} was silent for {self.fetching.read_timeout_s:g} s", again=True) from None
        except (httpcore2.RemoteProtocolError, httpcore2.LocalProtocolError, h11.ProtocolError) as error:
            reason = next((reason for words, reason in _CUT.items() if words in str(error)), "not HTTP")
            raise _Failed(reason, str(error)[:200], again=reason != "not HTTP") from error
        except (httpcore2.NetworkError, ssl.SSLError, OSError) as error:
            raise _Failed("broken connection", f"{hop.origin}: {error or type(error).__name__}", again=True) from error

    def _too_slow(self, hop: _Hop) -> _Failed:
        return _Failed("too slow", f"{hop.origin} had not sent it after {self.fetching.deadline_s:g} s")

    def _receive(self, response: httpcore2.Response, body: IO[bytes]) -> tuple[int, str]:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers]
        values = {name.lower(): value.strip() for name, value in headers}
        self._check_answer(response.status, headers, values)
        size, digest, head = 0, hashlib.sha256(), b""
        for chunk in response.iter_stream():
            size += len(chunk)
            self._check_size(size)
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                if len(head) == HEAD_BYTES:
                    _check_kind(head)
            digest.update(chunk)
            body.write(chunk)
        _check_kind(head)
        return size, digest.hexdigest()

    def _check_answer(self, status: int, headers: list[tuple[str, str]], values: dict[str, str]) -> None:
        if status != 200:
            pause_s = _seconds(values.get("retry-after", ""))
            again = status in _LATER and pause_s <= self.fetching.longest_pause_s
            wait = f"; the host asks for a pause of {pause_s:,.0f} s" if pause_s else ""
            raise _Failed(f"HTTP {status}", f"the host answers with {status}{wait}", again=again, pause_s=pause_s if again else 0.0)
        if not self.fetching.ignore_opt_out and (reserved := reserved_by(headers, self.fetching.user_agent)):
            raise _Failed("opted out", reserved)
        if values.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise _Failed("compressed", f"Content-Encoding: {values['content-encoding'][:50]}, which was not asked for")
        if (length := values.get("content-length", "")).isdigit():
            self._check_size(int(length))

    def _check_size(self, size: int) -> None:
        if size > self.fetching.max_bytes:
            raise _Failed("too large", f"{size:,} bytes or more; at most {self.fetching.max_bytes:,} are fetched")

    def _ask_robots(self, hop: _Hop, deadline: Deadline) -> None:
        try:
            seconds = deadline.within(_ROBOTS_S)
        except DeadlinePassed:
            raise self._too_slow(hop) from None
        allowed, problem = self._robots.judge(hop.origin, hop.url, seconds)
        if problem.startswith("HTTP"):
            raise _Failed("robots.txt unreadable", problem)
        if problem:
            reason, _, detail = problem.partition(": ")
            where = "" if reason == "forbidden address" else "; asked for robots.txt"
            raise _Failed(reason, f"{detail}{where}", unreachable=reason in ("no connection", "host not found"))
        if not allowed:
            raise _Failed("robots.txt", f"{hop.origin}/robots.txt disallows it")

    def _read_robots(self, origin: str, seconds: float) -> Rules:
        """RFC 9309: what is not there allows everything, what cannot be had for now nothing."""
        url, deadline = f"{origin}/robots.txt", Deadline(seconds)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                with self._sent(_hop(url), deadline) as response:
                    if response.status not in _REDIRECTS:
                        return _rules(response)
                    url = _redirect(url, response)
        except _Failed as error:
            return Rules(problem=f"{error.reason}: {error.detail}")
        return Rules()


def _rules(response: httpcore2.Response) -> Rules:
    if response.status == 429 or response.status >= 500:
        return Rules(problem=f"HTTP {response.status}: the host answers so for robots.txt")
    text = BytesIO()
    for chunk in response.iter_stream() if response.status == 200 else ():
        text.write(chunk)
        if text.tell() > _MAX_ROBOTS_BYTES:
            break
    return Rules(text.getvalue()[:_MAX_ROBOTS_BYTES].decode("utf-8", "replace"))


def _hop(url: str) -> _Hop:
    """The parts of an address.

    Raises:
        _Failed: it is not one that is asked for.
    """
    if len(url) > _MAX_URL or re.search(r"[\x00-\x1f\x7f]", url):
        raise _Failed("forbidden address", f"'{url[:100]!r}' is longer than {_MAX_URL} characters, or holds control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _Failed("forbidden address", f"'{url[:200]}': {error}") from None
    if parts.scheme not in ("http", "https"):
        raise _Failed("forbidden address", f"'{url[:200]}' is neither http nor https")
    if parts.username is not None or not parts.hostname or "\\" in parts.netloc:
        raise _Failed("forbidden address", f"'{url[:200]}' names no host, or a user")
    port = port or (443 if parts.scheme == "https" else 80)
    if port < 1024 and port not in _PORTS:
        raise _Failed("forbidden address", f"'{url[:200]}': port {port} is no web server's")
    try:
        host = plain_host(parts.hostname)
    except Refused as error:
        raise _Failed("forbidden address", str(error)) from None
    query = f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
    return _Hop(parts.scheme, host, port, f"{quote(parts.path, safe=_SAFE) or '/'}{query}")


def _redirect(url: str, response: httpcore2.Response) -> str:
    place = next((value for name, value in response.headers if name.lower() == b"location"), b"").decode("latin-1").strip()
    if not place:
        raise _Failed(f"HTTP {response.status}", "a redirect that does not say where to")
    try:
        return urljoin(url, place)
    except ValueError as error:
        raise _Failed("forbidden address", f"a redirect to '{place[:200]}': {error}") from None


def _check_kind(head: bytes) -> None:
    if not kind_of(head):
        what = f"it begins with {head!r}" if head else "it is empty"
        raise _Failed("neither image nor recording", what)


def _seconds(value: str) -> float:
    """Retry-After, in seconds or as a date; 0 when there is none."""
    if value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()) if value else 0.0
    except ValueError:
        return 0.0
