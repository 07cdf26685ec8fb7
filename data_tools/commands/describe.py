"""clipscale-shards describe: the command, its options and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipscale.errors import DataError
from data_tools.terminal import progress_line, say


def describe(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set, or its fsspec address.", show_default=False)],
    page: Annotated[
        Path | None,
        typer.Option(help="Also write a page to look at and listen to: an .html file that needs nothing else.", show_default="no page"),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=2_000, help="Samples shown on the page, spread evenly over the data set.")] = 60,
) -> None:
    """Say what is in a data set: counts, sizes, durations, captions, labels and duplicates."""
    from data_tools.describe import describe as describe_dataset
    from data_tools.page import write_page

    if page and not page.absolute().parent.is_dir():
        raise DataError(f"page {page}: cannot be written: there is no folder {page.parent}")
    with progress_line("describing") as show:
        description = describe_dataset(dataset, show=show)
    say("\n".join(description.lines()))
    if page:
        write_page(description, page, num_samples=samples)
        say(f"page: {page}")
