"""A web server of files on this machine that goes wrong as told: errors, stalls, short and wrong answers, lies in its headers."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("error", "busy", "close", "stall", "short", "cut", "shifted", "flipped", "whole")
"""500; 429; no answer at all; too late; less than asked, and says so; less than it says; other bytes; one flipped bit; all of the file."""


@dataclass
class UnreliableServer:
    """What it serves and how it goes wrong; may be changed while it runs."""

    folder: Path
    faults: Sequence[str] = ()
    share: float = 0.05
    """Of the requests for which something goes wrong."""
    stall_s: float = 1.0
    gate: threading.Barrier | None = None
    """Requests wait here until so many are under way."""
    authorization: str | None = None
    """The header that requests must bring; all others are answered 401."""
    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by file name."""
    sent: Counter[str] = field(default_factory=Counter)
    """Answers by what went wrong, or 'right'."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    draws: random.Random = field(default_factory=lambda: random.Random(7))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, name: str) -> str:
        with self.lock:
            self.asked[name] += 1
            found = self.draws.choice(self.faults) if self.faults and self.draws.random() < self.share else "right"
            self.sent[found] += 1
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    about: UnreliableServer

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.about.gate is not None:
            with suppress(threading.BrokenBarrierError):
                self.about.gate.wait()
        with suppress(ConnectionError):
            self._answer()

    def _answer(self) -> None:
        name = self.path.removeprefix("/")
        if self.about.authorization not in (None, self.headers.get("Authorization")):
            self._send(401, b"who are you?")
            return
        fault, path = self.about.fault(name), self.about.folder / name
        if not path.is_file():
            self._send(404, b"not here")
            return
        data = path.read_bytes()
        status, first, last = 200, 0, len(data) - 1
        if asked := self.headers.get("Range"):
            first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
            status = 206
        wanted = data[first : last + 1]
        if fault in ("error", "busy"):
            self._send(500 if fault == "error" else 429, b"not now")
        elif fault == "close":
            self.close_connection = True
        elif fault == "stall":
            time.sleep(self.about.stall_s)
            self._send(status, wanted)
        elif fault == "short":
            self._send(status, wanted[:-7])
        elif fault == "cut":
            self._send(status, wanted[: len(wanted) // 2], length=len(wanted))
            self.close_connection = True
        elif fault == "shifted":
            self._send(status, data[first + 1 : last + 1] + data[:1])
        elif fault == "flipped":
            middle = len(wanted) // 2
            self._send(status, wanted[:middle] + bytes([wanted[middle] ^ 4]) + wanted[middle + 1 :])
        elif fault == "whole":
            self._send(200, data)
        else:
            self._send(status, wanted)

    def _send(self, status: int, body: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", f'"{self.about.draws.random()}"')  # another one each time, for the same bytes
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def unreliable_server(folder: Path) -> Iterator[UnreliableServer]:
    """The server, until the block ends; nothing goes wrong before `faults` are set."""
    about = UnreliableServer(folder)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"about": about}))
    about.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield about
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
