"""A web server on this machine that behaves as badly as the path asks for, and counts who asked for what."""

from __future__ import annotations

import gzip
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from making_data import png

Answer = Callable[["Request"], None]


@dataclass
class Server:
    """Where it is, and every request it got: path and headers."""

    port: int
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    robots: bytes = b""
    """robots.txt; empty: there is none."""
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        """Every path asked for, robots.txt left out."""
        return [path for path, _ in self.asked if path != "/robots.txt"]


@dataclass
class Request:
    """One request, to be answered as badly as needed."""

    server: Server
    path: str
    socket: socket.socket

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def drip(self, data: bytes) -> None:
        """A byte at a time, until the server ends or the other side has gone."""
        for place in range(len(data)):
            self.send(data[place : place + 1])
            if self.server.ending.wait(0.05):
                return


def bomb_png(side: int) -> bytes:
    """A black picture of side × side pixels in a few hundred kB, made without ever holding it."""
    packer, packed = zlib.compressobj(9), b""
    for _ in range(side):
        packed += packer.compress(bytes(1 + 3 * side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed + packer.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


BOMB = bomb_png(10_000)


def endless(request: Request) -> None:
    request.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + png(1))
    with suppress(OSError):
        while not request.server.ending.is_set():
            request.send(bytes(1 << 16))


GZIP_BOMB = gzip.compress(bytes(10_000_000), 1)


def gzip_bomb(request: Request) -> None:
    request.answer(GZIP_BOMB, "Content-Encoding: gzip", "Content-Type: image/png")


def good(number: int) -> Answer:
    """A picture, whatever the header says of it."""
    return lambda request: request.answer(png(number), "Content-Type: text/html")


def redirect(place: str) -> Answer:
    return lambda request: request.answer(b"", f"Location: {place}", status="302 Found")


def slow_headers(request: Request) -> None:
    request.drip(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: slow\r\n" % number for number in range(10_000)))


def huge_headers(request: Request) -> None:
    request.send(b"HTTP/1.1 200 OK\r\n")
    with suppress(OSError):
        for number in range(200_000):
            request.send(b"X-%d: %s\r\n" % (number, b"h" * 1_000))


HOSTILE: dict[str, tuple[Answer, str]] = {
    "drip.png": (lambda request: request.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + bytes(9_000)), "too slow"),
    "slow_headers.png": (slow_headers, "too slow"),
    "silent.png": (lambda request: request.server.ending.wait(60) and None, "timeout"),
    "endless.png": (endless, "too large"),
    "promised.png": (lambda request: request.answer(b"", length=10**12), "too large"),
    "gzip.png": (gzip_bomb, "compressed"),
    "huge_headers.png": (huge_headers, "not HTTP"),
    "noise.png": (lambda request: request.send(b"\x00\xff" * 500), "not HTTP"),
    "short.png": (lambda request: request.answer(png(1), length=5_000), "cut off"),
    "html.png": (
        lambda request: request.answer(b"<html><body>sorry</body></html>", "Content-Type: image/png"),
        "neither image nor recording",
    ),
    "empty.png": (lambda request: request.answer(b""), "neither image nor recording"),
    "half.png": (lambda request: request.answer(png(1)[:-20]), "unreadable image"),
    "bomb.png": (lambda request: request.answer(BOMB), "unreadable image"),
    "loop.png": (redirect("/loop.png"), "too many redirects"),
    "to_metadata.png": (redirect("http://169.254.169.254/latest/meta-data/"), "forbidden address"),
    "to_private.png": (redirect("http://10.0.0.1/a.png"), "forbidden address"),
    "to_decimal.png": (redirect("http://2130706433/a.png"), "forbidden address"),
    "to_octal.png": (redirect("http://0177.0.0.1/a.png"), "forbidden address"),
    "to_mapped.png": (redirect("http://[::ffff:10.0.0.1]/a.png"), "forbidden address"),
    "to_file.png": (redirect("file:///etc/passwd"), "forbidden address"),
    "to_gopher.png": (redirect("gopher://127.0.0.1/"), "forbidden address"),
    "to_user.png": (redirect("http://me@127.0.0.1/"), "forbidden address"),
    "missing.png": (lambda request: request.answer(b"", status="404 Not Found"), "HTTP 404"),
    "broken.png": (lambda request: request.answer(b"", status="500 Oh"), "HTTP 500"),
    "later.png": (lambda request: request.answer(b"", "Retry-After: 86400", status="429 Slow down"), "HTTP 429"),
    "noai.png": (lambda request: request.answer(png(1), "X-Robots-Tag: noai"), "opted out"),
    "tdm.png": (lambda request: request.answer(png(1), "TDM-Reservation: 1"), "opted out"),
    "close.png": (lambda _: None, "broken connection"),
}
"""What the server does, by path, and what must be said of it."""

GOOD: dict[str, Answer] = {
    **{f"good{number}.png": good(number) for number in range(20)},
    "moved.png": redirect("/good3.png"),
    "open.png": lambda request: request.answer(png(40), "X-Robots-Tag: otherbot: noai, max-snippet: 5"),
    "once.png": lambda request: (
        request.answer(png(41)) if request.server.paths().count("/once.png") > 1 else request.answer(b"", status="503 Busy")
    ),
}


@contextmanager
def hostile_server(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """The server, until the block ends; with `tls` it speaks https alone."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Server(listener.getsockname()[1])
    threading.Thread(target=_accept, args=(listener, server, tls), daemon=True).start()
    try:
        yield server
    finally:
        server.ending.set()
        listener.close()


def _accept(listener: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection, server, tls), daemon=True).start()


def _serve(plain: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
    with plain, suppress(OSError), tls.wrap_socket(plain, server_side=True) if tls else plain as connection:
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65_536)
            if not more:
                return
            data += more
        first, *lines = data.decode("latin-1").partition("\r\n\r\n")[0].split("\r\n")
        path = first.split(" ")[1]
        server.asked.append((path, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}))
        request = Request(server, path, connection)
        name = path.removeprefix("/").partition("?")[0]
        if name == "robots.txt":
            request.answer(server.robots, status="200 OK" if server.robots else "404 Not Found")
        elif name in HOSTILE:
            HOSTILE[name][0](request)
        elif name in GOOD:
            GOOD[name](request)
        elif name == "elsewhere.png":
            redirect("https://elsewhere.example/good3.png")(request)
        else:
            request.answer(b"", status="404 Not Found")
