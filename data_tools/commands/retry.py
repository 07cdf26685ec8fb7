"""clipscale-shards retry: the command, its options and what it prints."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from data_tools.commands.build import fetching_of
from data_tools.terminal import progress_line, say

HELP = """
Try the rows of a data set that failed again: files that were mended, addresses that may answer by now.

What succeeds is added in new shards behind the others, which are not touched; rows that were left out as asked (too small, too long) are
not tried. What fails again stays in failures.jsonl, with its new reason. Addresses are asked for with the options given here.

Examples:

    clipscale-shards retry shards/

    clipscale-shards retry shards/ --deadline 300 --host-rate 1
"""


def retry(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set that clipscale-shards build made.", show_default=False)],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
    deadline: Annotated[float, typer.Option(help="Longest time for one address in seconds, redirects included.")] = 60.0,
    connect_timeout: Annotated[float, typer.Option(help="Longest wait for a connection, seconds.")] = 10.0,
    read_timeout: Annotated[float, typer.Option(help="Longest silence of a server, seconds.")] = 15.0,
    max_bytes: Annotated[int, typer.Option(help="Largest image or recording that is fetched.")] = 32_000_000,
    threads: Annotated[int, typer.Option(help="Addresses fetched at the same time.")] = 32,
    per_host: Annotated[int, typer.Option(help="Of one host.")] = 4,
    host_rate: Annotated[float, typer.Option(help="Most requests a second to one host; 0: no limit.")] = 10.0,
    tries: Annotated[int, typer.Option(help="How often to ask where another time may help.")] = 3,
    user_agent: Annotated[str | None, typer.Option(help="Who asks.", show_default="clipscale-shards/VERSION")] = None,
    ignore_robots: Annotated[bool, typer.Option("--ignore-robots", help="Fetch what a host's robots.txt disallows.")] = False,
    ignore_opt_out: Annotated[bool, typer.Option("--ignore-opt-out", help="Keep what a header reserves.")] = False,
    allow_loopback: Annotated[bool, typer.Option("--allow-loopback", help="Also fetch from this machine.")] = False,
) -> None:
    from data_tools.retry import retry as retry_dataset

    given = {
        "deadline_s": deadline,
        "connect_timeout_s": connect_timeout,
        "read_timeout_s": read_timeout,
        "max_bytes": max_bytes,
        "threads": threads,
        "per_host": per_host,
        "host_rate": host_rate,
        "tries": tries,
        "ignore_robots": ignore_robots,
        "ignore_opt_out": ignore_opt_out,
        "allow_loopback": allow_loopback,
    }
    fetching = fetching_of(**given, **({} if user_agent is None else {"user_agent": user_agent}))
    started = time.monotonic()
    with progress_line("retrying") as show:
        summary = retry_dataset(dataset, workers=workers, fetching=fetching, show=show)
    if not summary.tried:
        say(f"{dataset}: no row failed; nothing to try again")
        return
    where = f" in {', '.join(summary.shards[:5])}{', ...' if len(summary.shards) > 5 else ''}" if summary.shards else ""
    say(f"{dataset}: {summary.samples:,} of {summary.tried:,} rows became samples{where}, {time.monotonic() - started:.1f} s")
    if summary.failures:
        counts = ", ".join(f"{reason} {number:,}" for reason, number in sorted(summary.failures.items()))
        say(f"failed again: {counts}; see {dataset.rstrip('/')}/failures.jsonl")
