"""clipscale-shards retry: the command, its options and what it prints."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from data_tools.commands._options import (
    AllowLoopback,
    ConnectTimeout,
    Deadline,
    HostRate,
    IgnoreOptOut,
    IgnoreRobots,
    MaxBytes,
    PerHost,
    ReadTimeout,
    Scratch,
    Threads,
    Tries,
    UserAgent,
    fetching_of,
)
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
    dataset: Annotated[
        str, typer.Argument(help="Data set that clipscale-shards build made: a folder, or its fsspec address.", show_default=False)
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
    scratch: Scratch = None,
    deadline: Deadline = 60.0,
    connect_timeout: ConnectTimeout = 10.0,
    read_timeout: ReadTimeout = 15.0,
    max_bytes: MaxBytes = 32_000_000,
    threads: Threads = 32,
    per_host: PerHost = 4,
    host_rate: HostRate = 10.0,
    tries: Tries = 3,
    user_agent: UserAgent = None,
    ignore_robots: IgnoreRobots = False,
    ignore_opt_out: IgnoreOptOut = False,
    allow_loopback: AllowLoopback = False,
) -> None:
    from data_tools.retry import retry as retry_dataset

    fetching = fetching_of(
        deadline=deadline,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        max_bytes=max_bytes,
        threads=threads,
        per_host=per_host,
        host_rate=host_rate,
        tries=tries,
        user_agent=user_agent,
        ignore_robots=ignore_robots,
        ignore_opt_out=ignore_opt_out,
        allow_loopback=allow_loopback,
    )
    started = time.monotonic()
    with progress_line("retrying") as show:
        summary = retry_dataset(dataset, workers=workers, fetching=fetching, scratch=scratch, show=show)
    if not summary.tried:
        say(f"{dataset}: no row failed; nothing to try again")
        return
    where = f" in {', '.join(summary.shards[:5])}{', ...' if len(summary.shards) > 5 else ''}" if summary.shards else ""
    say(f"{dataset}: {summary.samples:,} of {summary.tried:,} rows became samples{where}, {time.monotonic() - started:.1f} s")
    if summary.failures:
        counts = ", ".join(f"{reason} {number:,}" for reason, number in sorted(summary.failures.items()))
        say(f"failed again: {counts}; see {dataset.rstrip('/')}/failures.jsonl")
