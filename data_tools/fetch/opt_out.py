"""What hosts say about being used: robots.txt (RFC 9309), the X-Robots-Tag header, the TDM-Reservation header.

The words of X-Robots-Tag are those that img2dataset honours, and noml; a word meant for another crawler by name is not meant for us.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from protego import Protego

_RESERVING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_WITH_VALUES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})  # 'word: value', no crawler's name
_KEPT = 10_000  # hosts


def reserved_by(headers: Iterable[tuple[str, str]], user_agent: str) -> str:
    """The header line that reserves the content; empty when none does."""
    name = agent_name(user_agent).lower()
    for header, value in headers:
        if header.lower() == "tdm-reservation" and value.strip() == "1":
            return f"TDM-Reservation: {value.strip()}"
        if header.lower() == "x-robots-tag" and _RESERVING & set(_directives(value, name)):
            return f"X-Robots-Tag: {value[:200]}"
    return ""


def _directives(value: str, name: str) -> Iterable[str]:
    """The words that are meant for everyone or for us: 'noai, otherbot: noindex, nofollow' has noai alone."""
    ours = True
    for part in value.lower().split(","):
        agent, colon, rest = part.partition(":")
        if colon and agent.strip() not in _WITH_VALUES:
            ours, part = agent.strip() in (name, "*"), rest
        if ours:
            yield part.strip()


def agent_name(user_agent: str) -> str:
    """The word that robots.txt knows a crawler by: 'clipscale-shards' of 'clipscale-shards/0.1 (...)'."""
    return re.split(r"[/\s]", user_agent, maxsplit=1)[0]


@dataclass(frozen=True)
class Rules:
    """A host's robots.txt."""

    text: str = ""
    problem: str = ""
    """Why it could not be read, for now: nothing may be fetched then."""


class Robots:
    """The robots.txt of every host, read once; threads that need the same one wait for it."""

    def __init__(self, user_agent: str, read: Callable[[str, float], Rules]) -> None:
        self._agent, self._read = agent_name(user_agent), read
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[tuple[Protego, Rules]]] = OrderedDict()

    def judge(self, origin: str, url: str, seconds: float) -> tuple[bool, str]:
        """Whether `url` may be fetched, and why that cannot be said for now; reading the rules may take so many seconds."""
        with self._lock:
            known = self._known.get(origin)
            first = known is None
            if known is None:
                known = self._known[origin] = Future()
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        if first:
            try:
                rules = self._read(origin, seconds)
                known.set_result((Protego.parse(rules.text), rules))
            except BaseException as error:  # those that wait must not wait for ever
                known.set_exception(error)
                raise
        parsed, rules = known.result()
        return not rules.problem and parsed.can_fetch(url, self._agent), rules.problem

    def crawl_delay(self, origin: str) -> float:
        """Seconds between requests that a robots.txt asks for; 0 while it has not been read."""
        with self._lock:
            known = self._known.get(origin)
        if known is None or not known.done() or known.exception() is not None:
            return 0.0
        return float(known.result()[0].crawl_delay(self._agent) or 0.0)
