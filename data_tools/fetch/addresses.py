"""Which addresses of the network may be contacted: public ones; and names, resolved once and checked.

A name is resolved once for some time, every address it stands for is checked, and connections go to the very address that was checked:
a name server that answers differently the second time (DNS rebinding) is not asked a second time.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import idna

Resolve = Callable[[str], list[str]]
"""A host's addresses, as text; raises OSError when it has none."""

_METADATA = {"168.63.129.16"}  # Azure's; the others (169.254.169.254, 100.100.100.200, 192.0.0.192, fd00:ec2::254) are not public anyway
_SPECIAL = [
    ip_network(network)  # IANA's registries of special-purpose addresses; Python's own lists differ from release to release
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
_PUBLIC_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_KEPT_S = 300.0  # how long a name's addresses are used
_KEPT = 10_000  # names
_LOOKUPS = 16  # at the same time


class Refused(Exception):
    """An address that is not contacted."""


class NoAnswer(Exception):
    """A name that could not be resolved, now."""


def resolve(host: str) -> list[str]:
    """A host's addresses, from the system."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def why_refused(address: str, *, allow_loopback: bool = False) -> str:
    """Why this address, as text of digits, may not be contacted; empty when it may."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return "not an address"
    inner = _inside(ip)
    if inner is not None and not (inner.is_loopback and allow_loopback):
        return why_refused(str(inner))
    if ip.is_loopback or (inner is not None and inner.is_loopback):
        return "" if allow_loopback else "this machine itself"
    if str(ip) in _METADATA or ip.is_link_local:
        return "link-local or a cloud's metadata service"
    if ip.is_multicast:
        return "multicast"
    if not ip.is_global or any(ip in network for network in _SPECIAL) or (isinstance(ip, IPv6Address) and ip not in _PUBLIC_V6):
        return "private or reserved"
    return ""


def _inside(ip: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, Teredo, NAT64, compatible."""
    if isinstance(ip, IPv4Address):
        return None
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def plain_host(host: str) -> str:
    """The host as it goes over the wire: ASCII, without odd ways to write an address (2130706433, 0x7f.1, 0177.0.0.1).

    Raises:
        Refused: it is no name and no address.
    """
    if ":" in host:
        try:
            if "%" not in host:
                return str(IPv6Address(host))
        except ValueError:
            pass
        raise Refused(f"'{host[:100]}' is not an address of the web")
    if re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", host.rstrip(".").rpartition(".")[2], re.IGNORECASE):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise Refused(f"'{host[:100]}' is an odd way to write an address") from None
    try:
        return host.lower() if host.isascii() and re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host) else idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        raise Refused(f"'{host[:100]}' is not the name of a host") from None


class Names:
    """Checked addresses of names, remembered for a while; safe to use from several threads."""

    def __init__(self, *, allow_loopback: bool = False, resolve: Resolve = resolve) -> None:
        self._resolve, self._allow_loopback = resolve, allow_loopback
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Future[list[str]]]] = OrderedDict()
        self._lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="lookup")  # getaddrinfo knows no timeout

    def close(self) -> None:
        """Look up no more."""
        self._lookups.shutdown(wait=False, cancel_futures=True)

    def addresses(self, host: str, *, timeout_s: float) -> list[str]:
        """Addresses that may be contacted.

        Raises:
            Refused: one of the host's addresses may not.
            NoAnswer: it has none, or the name server is too slow.
        """
        try:
            found = self._looked_up(host).result(timeout_s)
        except TimeoutError:
            raise NoAnswer(f"no name server told where {host} is within {timeout_s:.1f} s") from None
        except (OSError, UnicodeError) as error:
            raise NoAnswer(f"{host} cannot be resolved: {error}") from error
        for address in found:
            if why := why_refused(address, allow_loopback=self._allow_loopback):
                raise Refused(f"{host} is {address}: {why}")
        if not found:
            raise NoAnswer(f"{host} has no address")
        return found

    def _looked_up(self, host: str) -> Future[list[str]]:
        now = time.monotonic()
        with self._lock:
            known = self._known.get(host)
            if known is None or known[0] < now or (known[1].done() and known[1].exception() is not None):
                known = (now + _KEPT_S, self._lookups.submit(self._resolve, host))
                self._known[host] = known
                self._known.move_to_end(host)
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            return known[1]
