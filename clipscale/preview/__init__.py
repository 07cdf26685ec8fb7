"""Preview: what a run will read, told before it runs: the mix, epochs, padding, speed, and the first samples to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clipscale.errors import DataError
from clipscale.preview.page import html_page
from clipscale.preview.survey import KindSurvey, SourceSurvey, survey

if TYPE_CHECKING:
    from rich.console import Console


def write_page(path: Path, html: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(html, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise DataError(f"page {path}: cannot be written: {error.strerror}; name another with --page") from None
    finally:
        aside.unlink(missing_ok=True)


def print_summary(kinds: list[KindSurvey], console: Console) -> None:
    """The figures for the terminal."""
    from rich.table import Table
    from rich.text import Text

    for kind in kinds:
        table = Table(title=Text(f"{kind.name}: {kind.batches:,} global batches of {kind.global_batch:,}"))
        table.add_column("source", overflow="fold")
        for column in ("shards", "samples", "weight", "rows", "epochs"):
            table.add_column(column, justify="right", no_wrap=True)
        for source in kind.sources:
            table.add_row(Text(source.name), *map(_shown, (source.shards, source.samples, source.weight, source.rows, source.epochs)))
        console.print(table)
        for batch, weights in kind.weight_changes.items():
            console.print(f"from global batch {batch:,}: {', '.join(f'{name} {weight:g}' for name, weight in weights.items())}")
        paddings = ", ".join(
            f"{'no' if batches == 1 else f'{batches}-batch'} buckets {share:.1%}" for batches, share in kind.padding.items()
        )
        if paddings:
            console.print(f"padding {kind.padding_of}: {paddings}")
        bad = f"; {kind.bad} could not be read" if kind.bad else ""
        console.print(f"{kind.samples_per_second:,.0f} samples/s in one process, over {kind.rows_read:,} samples{bad}")


def _shown(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


__all__ = ["KindSurvey", "SourceSurvey", "html_page", "print_summary", "survey", "write_page"]
