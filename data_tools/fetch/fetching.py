"""Fetching: the settings that say how media are fetched; they decide what is waited for and honoured, not a data set's bytes."""

from __future__ import annotations

from pydantic import Field

from clipscale import __version__
from clipscale.settings import Settings

USER_AGENT = f"clipscale-shards/{__version__} (builds data sets; honours robots.txt)"


class Fetching(Settings):
    """How addresses are fetched."""

    connect_timeout_s: float = Field(default=10.0, gt=0, le=600)
    """Longest wait for a connection, name resolution and TLS included."""
    read_timeout_s: float = Field(default=15.0, gt=0, le=600)
    """Longest silence of a server."""
    deadline_s: float = Field(default=60.0, gt=0, le=3_600)
    """Longest time for one address, redirects included: a server that sends a byte a second does not keep us."""
    max_bytes: int = Field(default=32_000_000, ge=1_000, le=1 << 30)
    """Largest image or recording; more is refused by the header, or while it arrives."""
    threads: int = Field(default=32, ge=1, le=512)
    """Addresses fetched at the same time, over all hosts."""
    per_host: int = Field(default=4, ge=1, le=64)
    """Addresses fetched at the same time from one host."""
    host_rate: float = Field(default=10.0, ge=0, le=10_000)
    """Most requests begun in a second at one host; 0 is no limit."""
    tries: int = Field(default=3, ge=1, le=10)
    """How often an address is asked for in all, where another time may help: timeouts, broken connections, 408, 429, 500, 502, 503, 504."""
    longest_pause_s: float = Field(default=120.0, gt=0, le=3_600)
    """A host that asks for a longer pause (Retry-After) has refused."""
    user_agent: str = Field(default=USER_AGENT, min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")
    """Who is asking; its first word is what robots.txt is read for."""
    ignore_robots: bool = False
    """Fetch what a host's robots.txt disallows."""
    ignore_opt_out: bool = False
    """Keep what an X-Robots-Tag (noai, noimageai, noindex, noimageindex, noml, none) or TDM-Reservation: 1 reserves."""
    allow_loopback: bool = False
    """Also fetch from this very machine (127.0.0.0/8 and ::1): for a server of your own."""
