"""What several commands share: the options of fetching, and settings made of what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from clipscale.errors import ConfigError

if TYPE_CHECKING:
    from data_tools.fetch.fetching import Fetching
    from data_tools.packing import Packing

Kind = TypeVar("Kind", bound="Packing | Fetching")
_WEB = "Addresses of the web: how they are fetched"

Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder in which shards wait for their upload, when it goes to an address.", show_default="temporary"),
]
Deadline = Annotated[float, typer.Option(rich_help_panel=_WEB, help="Longest time for one address in seconds, redirects included.")]
ConnectTimeout = Annotated[float, typer.Option(rich_help_panel=_WEB, help="Longest wait for a connection, seconds.")]
ReadTimeout = Annotated[float, typer.Option(rich_help_panel=_WEB, help="Longest silence of a server, seconds.")]
MaxBytes = Annotated[int, typer.Option(rich_help_panel=_WEB, help="Largest image or recording that is fetched.")]
Threads = Annotated[int, typer.Option(rich_help_panel=_WEB, help="Addresses fetched at the same time.")]
PerHost = Annotated[int, typer.Option(rich_help_panel=_WEB, help="Of one host.")]
HostRate = Annotated[float, typer.Option(rich_help_panel=_WEB, help="Most requests a second to one host; 0: no limit.")]
Tries = Annotated[
    int, typer.Option(rich_help_panel=_WEB, help="How often to ask where another time may help: timeouts, 429, 503 and such.")
]
UserAgent = Annotated[
    str | None,
    typer.Option(rich_help_panel=_WEB, help="Who asks; put an address of yours into it.", show_default="clipscale-shards/VERSION"),
]
IgnoreRobots = Annotated[bool, typer.Option("--ignore-robots", rich_help_panel=_WEB, help="Fetch what a host's robots.txt disallows.")]
IgnoreOptOut = Annotated[
    bool,
    typer.Option(
        "--ignore-opt-out",
        rich_help_panel=_WEB,
        help="Keep what an X-Robots-Tag (noai, noimageai, noindex, noimageindex, noml, none) or TDM-Reservation header reserves.",
    ),
]
AllowLoopback = Annotated[
    bool, typer.Option("--allow-loopback", rich_help_panel=_WEB, help="Also fetch from this machine: for a server of your own.")
]


def fetching_of(*, deadline: float, connect_timeout: float, read_timeout: float, user_agent: str | None, **others: Any) -> Fetching:
    """The settings of fetching that options say; `others` are called as the options are.

    Raises:
        ConfigError: names the option, what was given and what is wrong with it.
    """
    from data_tools.fetch.fetching import Fetching

    seconds = {"deadline_s": deadline, "connect_timeout_s": connect_timeout, "read_timeout_s": read_timeout}
    return checked(Fetching, {**seconds, **others, **({} if user_agent is None else {"user_agent": user_agent})})


def checked(kind: type[Kind], settings: dict[str, Any]) -> Kind:
    """Settings of this class.

    Raises:
        ConfigError: names the option, what was given and what is wrong with it.
    """
    from pydantic import ValidationError

    try:
        return kind(**settings)
    except ValidationError as error:
        line = error.errors()[0]
        message = str(line["msg"]).removeprefix("Value error, ")
        option = f"--{str(line['loc'][0]).removesuffix('_s').replace('_', '-')} {line['input']}: " if line["loc"] else ""
        raise ConfigError(f"{option}{message}") from None
