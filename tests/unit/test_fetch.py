"""Fetching in its parts: which addresses are contacted, whose turn it is, what hosts reserve, what is remembered."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from pathlib import Path

import httpcore2
import pytest
from hostile_server import Server, hostile_server
from making_data import png

from data_tools.fetch.addresses import Names, Refused, plain_host, why_refused
from data_tools.fetch.fetcher import Fetcher
from data_tools.fetch.fetching import Fetching
from data_tools.fetch.opt_out import reserved_by
from data_tools.fetch.outcome import Outcome
from data_tools.fetch.sniff import kind_of
from data_tools.fetch.store import Fetched
from data_tools.fetch.turns import Turns

PUBLIC = "93.184.215.14"  # never contacted: the network below takes every connection to this machine's server

# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "198.18.0.1", "192.0.2.1", "240.0.0.1"),
        *("255.255.255.255", "224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1", "fe80::1", "fe80::1%eth0", "fd00::1", "fec0::1"),
        *("169.254.169.254", "169.254.0.1", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
        *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "::10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::1", "2002:7f00:1::"),
        *("2001:db8::1", "2001:10::1", "3fff::1", "4000::1", "203.0.113.9", "192.88.99.1", "nonsense", ""),
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert why_refused(address)


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1"])
def test_public_addresses_are_not(address: str) -> None:
    assert not why_refused(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_the_flag_allows_this_machine_and_nothing_else(address: str) -> None:
    assert not why_refused(address, allow_loopback=True)
    assert why_refused("10.0.0.1", allow_loopback=True)
    assert why_refused("::ffff:169.254.169.254", allow_loopback=True)


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.0x1", "1.2.3.4.5", "::1%eth0", "a b", "a/b", "-" * 300],
)
def test_odd_ways_to_write_a_host_are_refused(host: str) -> None:
    with pytest.raises(Refused):
        plain_host(host)


def test_names_of_other_scripts_go_over_the_wire_as_dns_has_them() -> None:
    assert plain_host("Bücher.example") == "xn--bcher-kva.example"
    assert plain_host("EXAMPLE.org") == "example.org"


class Diverted(httpcore2.SyncBackend):
    """A network whose every connection ends at this machine's server; it notes which address was asked for."""

    def __init__(self, port: int) -> None:
        self.port, self.asked = port, list[str]()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        self.asked.append(f"{host}:{port}")
        return super().connect_tcp("127.0.0.1", self.port, timeout, local_address, socket_options)


class Rebinding:
    """A name server that tells a public address the first time, and this machine's ever after."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def fetched(server: Server, url: str, resolve: Rebinding, **settings: object) -> tuple[Outcome, bytes, Diverted]:
    network, body = Diverted(server.port), io.BytesIO()
    fetcher = Fetcher(Fetching(**settings), names=Names(resolve=resolve), network=network)  # type: ignore[arg-type]
    try:
        return fetcher.fetch(url, body), body.getvalue(), network
    finally:
        fetcher.close()


def test_a_name_is_resolved_once_and_the_connection_goes_to_the_address_that_was_checked() -> None:
    resolve = Rebinding([PUBLIC], ["127.0.0.1"])
    with hostile_server() as server:
        outcome, body, network = fetched(server, "http://rebinding.example/good4.png", resolve)
        host = server.asked[-1][1]["host"]
    assert (outcome.reason, body) == ("", png(4))
    assert resolve.asked == ["rebinding.example"]
    assert set(network.asked) == {f"{PUBLIC}:80"}
    assert host == "rebinding.example"


@pytest.mark.parametrize("answer", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:169.254.169.254"]])
def test_a_name_with_one_private_address_is_not_contacted_at_all(answer: list[str]) -> None:
    with hostile_server() as server:
        outcome, _, network = fetched(server, "http://inside.example/good4.png", Rebinding(answer))
        assert not server.asked
    assert outcome.reason == "forbidden address"
    assert not network.asked


def test_a_redirect_to_a_name_inside_is_refused() -> None:
    with hostile_server() as server:
        outcome, _, network = fetched(server, "http://out.example/to_private.png", Rebinding([PUBLIC], ["10.0.0.1"]), ignore_robots=True)
    assert outcome.reason == "forbidden address"
    assert network.asked == [f"{PUBLIC}:80"]


# --- reservations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value", "reserved"),
    [
        ("X-Robots-Tag", "noai", True),
        ("x-robots-tag", "nofollow, NoImageAI", True),
        ("X-Robots-Tag", "noml", True),
        ("X-Robots-Tag", "none", True),
        ("X-Robots-Tag", "otherbot: noindex", False),
        ("X-Robots-Tag", "clipscale-shards: noindex", True),
        ("X-Robots-Tag", "otherbot: nofollow, noindex", False),
        ("X-Robots-Tag", "max-snippet: 20, noindex", True),
        ("X-Robots-Tag", "nofollow", False),
        ("TDM-Reservation", "1", True),
        ("tdm-reservation", "0", False),
    ],
)
def test_what_headers_reserve(header: str, value: str, reserved: bool) -> None:
    assert bool(reserved_by([(header, value)], "clipscale-shards/1.0 (hello)")) == reserved


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (png(1), "image"),
        (b"RIFF....WEBPVP8 ", "image"),
        (b"RIFF....WAVEfmt ", "speech"),
        (b"\xff\xfb\x90\x64", "speech"),
        (b"<!doctype html>", ""),
        (b"%PDF-1.7", ""),
        (b"PK\x03\x04", ""),
    ],
)
def test_bodies_are_what_their_first_bytes_say(head: bytes, kind: str) -> None:
    assert kind_of(head[:16]) == kind


# --- turns -----------------------------------------------------------------------------------------------------------


def test_a_host_gets_no_more_than_its_share_and_holds_up_nobody() -> None:
    turns: Turns[int] = Turns(per_host=2, interval_s=0.0)
    for number in range(5):
        turns.add("a", number)
    turns.add("b", 10)
    assert [turns.take() for _ in range(3)] == [("a", 0), ("b", 10), ("a", 1)]
    waiting = list[object]()
    thread = threading.Thread(target=lambda: waiting.append(turns.take()))
    thread.start()
    thread.join(0.2)
    assert not waiting, "a third of host a may not begin while two are under way"
    turns.done("a")
    thread.join(10)
    assert waiting == [("a", 2)]


def test_a_paused_host_waits_while_others_go_on() -> None:
    turns: Turns[str] = Turns(per_host=4, interval_s=0.0)
    turns.add("a", "again", pause_s=3_600)
    turns.add("a", "behind it")
    turns.add("b", "meanwhile")
    assert turns.take() == ("b", "meanwhile")
    turns.close()
    assert turns.take() is None


# --- the store -------------------------------------------------------------------------------------------------------


def test_what_was_fetched_is_remembered_and_what_was_cut_off_is_not(tmp_path: Path) -> None:
    first = Fetched(tmp_path, 3)
    first.add(Outcome("a", size=5, sha256="s"), io.BytesIO(b"aaaaa"))
    first.add(Outcome("b", "HTTP 404", "gone"), io.BytesIO())
    first.add(Outcome("c", size=5, sha256="s"), io.BytesIO(b"ccccc"))
    first.close()
    data, log = (tmp_path / "fetched" / f"000003.{suffix}" for suffix in ("data", "jsonl"))
    data.write_bytes(data.read_bytes()[:7])  # the disk lost the end of the last body
    log.write_text(log.read_text() + '{"url": "d", "rea')
    again = Fetched(tmp_path, 3)
    assert [url in again for url in "abcd"] == [True, True, False, False]
    again.add(Outcome("c", size=3, sha256="s"), io.BytesIO(b"ccc"))
    again.close()
    assert data.read_bytes() == b"aaaaaccc"
    last = Fetched(tmp_path, 3)
    last.close()
    assert "c" in last, "a line behind one that was cut off is a line of its own"
