"""clipscale-shards verify: the command, its options and what it prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from data_tools.terminal import lines_file, progress_line, say, size

HELP = """
Check every byte of a data set against its checksums, and decode every image and recording.

Every flipped bit and every missing byte in the tars, the sidecars and the index is found; what is wrong is printed with shard, key and
reason. Exit code 0: all is as it was written; 1: something is not, or cannot be decoded; 2: there is no data set to check.

Damaged shards of a data set that was built here come back byte for byte when they are deleted and the same build command runs again.

Examples:

    clipscale-shards verify shards/

    clipscale-shards verify s3://bucket/shards --workers 16 --findings findings.jsonl

    clipscale-shards verify shards/ --quick
"""


def verify(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set, or its fsspec address.", show_default=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Read no tar: only sizes, the index and the sidecars; finds what is missing or cut off.")
    ] = False,
    findings: Annotated[
        Path | None,
        typer.Option(
            help="Also write what is wrong to this file, a JSON object a line; all of it, not just the first.", show_default="no file"
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Findings printed; the others are counted.")] = 50,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
) -> None:
    from clipscale.errors import ShardError
    from data_tools.verify import Finding
    from data_tools.verify import verify as verify_dataset

    started, printed = time.monotonic(), 0
    with lines_file(findings) as write, progress_line("verifying") as show:

        def found(finding: Finding) -> None:
            nonlocal printed
            write(vars(finding))
            printed += 1
            if printed <= most:
                say(finding.line())

        result = verify_dataset(dataset, found=found, quick=quick, workers=workers, show=show)
    looked = "sizes, index and sidecars" if quick else f"{size(result.bytes)} and every medium"
    summary = f"{dataset}: {result.samples:,} samples in {result.shards:,} shards; checked: {looked}; {time.monotonic() - started:.1f} s"
    if not result.reasons:
        say(f"{summary}; nothing wrong")
        return
    counts = ", ".join(f"{reason} {number:,}" for reason, number in result.reasons.most_common())
    where = f"; all are in {findings}" if findings else f"; {printed - most:,} more with --findings FILE" if printed > most else ""
    raise ShardError(f"{summary}; {result.reasons.total():,} findings ({counts}){where}")
