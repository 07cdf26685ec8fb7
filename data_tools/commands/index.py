"""clipscale-shards index: the command, its options and what it prints."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from data_tools.terminal import progress_line, say, size

HELP = """
Use webdataset tars as they are: write sidecars that say where every sample lies, and repack nothing.

For tars of img2dataset (jpg, txt, json), open_clip's and any plain webdataset, LAION's and CLAP's audio (flac, json). Captions are the
json's captions, else the txt, else the json's caption, text or transcript, a text or a list. Afterwards the folder is a data set for
source shards.

What cannot be used is left out by name and reason: keys that come twice or have dots, members of other samples in between, missing
partners, wrong or damaged media. Run again it reads only tars that are new or changed.

Examples:

    clipscale-shards index /data/cc12m

    clipscale-shards index s3://bucket/cc12m --sidecars sidecars/cc12m
"""


def index(
    tars: Annotated[str, typer.Argument(help="Folder that the tars lie in, or its fsspec address.", show_default=False)],
    sidecars: Annotated[
        str | None,
        typer.Option(help="Folder or address for sidecars and index, where the tars cannot be added to.", show_default="beside the tars"),
    ] = None,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Largest share of samples that may be left out.")] = 0.01,
    damaged_tars: Annotated[
        Literal["refuse", "keep"], typer.Option(help="keep takes the samples before a tar's damage, except the last.")
    ] = "refuse",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the result does not depend on it.", show_default="one a core")
    ] = None,
) -> None:
    from data_tools.index import index as make

    started = time.monotonic()
    with progress_line("indexing") as show:
        summary = make(tars, sidecars, max_bad=max_bad, damaged_tars=damaged_tars, workers=workers, show=show)
    kept = f" ({summary.reused_shards} stood already)" if summary.reused_shards else ""
    took = time.monotonic() - started
    say(f"{summary.output}: {summary.samples:,} samples in {summary.shards:,} tars{kept}, {size(summary.bytes)}, {took:.1f} s")
    if summary.failures:
        counts = ", ".join(f"{reason} {number:,}" for reason, number in summary.failures.items())
        say(f"left out: {counts}; listed in {summary.output.rstrip('/')}/failures.jsonl")
    if summary.output.rstrip("/") != summary.tars.rstrip("/"):
        say(f"to read it: {{name: shards, url: {summary.output}, tars: {summary.tars}}}")
