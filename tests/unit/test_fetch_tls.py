"""https: certificates are checked for the name that was asked for, while the connection goes to the address that was checked."""

from __future__ import annotations

import io
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpcore2
import pytest
import trustme
from hostile_server import Server, hostile_server
from making_data import png
from test_fetch import PUBLIC, Diverted, Rebinding

from data_tools.fetch.addresses import Names
from data_tools.fetch.fetcher import Fetcher
from data_tools.fetch.fetching import Fetching
from data_tools.fetch.outcome import Outcome


@dataclass
class Authority:
    """Who signs, whom the fetcher believes, and the names that servers were asked for (SNI)."""

    signs: trustme.CA = field(default_factory=trustme.CA)
    asked_for: list[str] = field(default_factory=list)

    def server_of(self, *names: str) -> ssl.SSLContext:
        """TLS of a server with a certificate for these names."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.signs.issue_cert(*names).configure_cert(tls)
        tls.sni_callback = lambda _, name, __: self.asked_for.append(name or "")
        return tls

    def believed(self) -> ssl.SSLContext:
        """TLS of a visitor who believes this authority and no other."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.signs.configure_trust(tls)
        return tls


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def fetched(server: Server, url: str, tls: ssl.SSLContext | None, *answers: list[str]) -> tuple[Outcome, bytes, Diverted]:
    network, body = Diverted(server.port), io.BytesIO()
    names = Names(resolve=Rebinding(*(answers or ([PUBLIC], ["127.0.0.1"]))))
    fetcher = Fetcher(Fetching(deadline_s=20, connect_timeout_s=0.5), names=names, network=network, tls=tls)
    try:
        return fetcher.fetch(url, body), body.getvalue(), network
    finally:
        fetcher.close()


def test_the_connection_goes_to_the_checked_address_and_asks_for_the_host_by_name(authority: Authority) -> None:
    with hostile_server(authority.server_of("photos.example")) as server:
        outcome, body, network = fetched(server, "https://photos.example/good4.png", authority.believed())
        hosts = {headers["host"] for _, headers in server.asked}
    assert (outcome.reason, body) == ("", png(4))
    assert set(network.asked) == {f"{PUBLIC}:443"}
    assert set(authority.asked_for) == hosts == {"photos.example"}


@pytest.mark.parametrize(
    ("names", "believed", "said"),
    [
        (["other.example"], True, "match"),
        (["photos.example"], False, "issuer"),
    ],
    ids=["another-host", "unknown-authority"],
)
def test_a_certificate_that_is_not_the_hosts_own_is_refused_and_nothing_is_asked_for(
    authority: Authority, names: list[str], believed: bool, said: str
) -> None:
    with hostile_server(authority.server_of(*names)) as server:
        tls = authority.believed() if believed else httpcore2.default_ssl_context()
        outcome, body, _ = fetched(server, "https://photos.example/good4.png", tls)
        assert not server.asked
    assert (outcome.reason, outcome.again, body) == ("bad certificate", False, b"")
    assert said in outcome.detail


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    years = {"not_before": datetime(2020, 1, 1, tzinfo=UTC), "not_after": datetime(2021, 1, 1, tzinfo=UTC)}
    authority.signs.issue_cert("photos.example", **years).configure_cert(tls)
    with hostile_server(tls) as server:
        outcome, _, _ = fetched(server, "https://photos.example/good4.png", authority.believed())
    assert outcome.reason == "bad certificate"
    assert "expired" in outcome.detail


def test_a_host_that_speaks_no_tls_is_no_bad_certificate(authority: Authority) -> None:
    def speak_plainly() -> None:
        for _ in range(2):  # robots.txt, and a second try of it
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=speak_plainly, daemon=True).start()
        outcome, _, _ = fetched(Server(listener.getsockname()[1]), "https://photos.example/good4.png", authority.believed())
    assert outcome.reason == "no connection"
    assert "SSL" in outcome.detail


def test_a_redirect_to_https_of_another_host_is_held_to_that_hosts_certificate(authority: Authority) -> None:
    with hostile_server(authority.server_of("photos.example")) as server:
        url = "https://photos.example/moved.png"
        assert fetched(server, url, authority.believed())[0].reason == ""
        away = "https://photos.example/elsewhere.png"
        assert fetched(server, away, authority.believed(), [PUBLIC])[0].reason == "bad certificate"
