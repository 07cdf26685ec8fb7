"""clipscale-shards finish: the command, its options and what it prints."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from data_tools.commands._shown import show_summary


def finish(
    output: Annotated[str, typer.Argument(help="Folder or fsspec address that several nodes have built.", show_default=False)],
    max_bad: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Largest share of rows that may fail.", show_default="0.01; 1 where media are fetched"),
    ] = None,
) -> None:
    """Write the index of a data set that several nodes have built; the node that ends last does so by itself."""
    from data_tools.build import finish_build

    started = time.monotonic()
    show_summary(finish_build(output, max_bad=max_bad), time.monotonic() - started)
