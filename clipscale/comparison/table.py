"""A comparison for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from clipscale.comparison import Change, Comparison
from clipscale.comparison.page import cell_texts
from clipscale.report.evaluation_section import phrase


def print_comparison(comparison: Comparison) -> None:
    """A table an evaluation, then what is not compared."""
    console = Console()
    console.print(f"A: {comparison.a}   B: {comparison.b}")
    for name in dict.fromkeys(change.evaluation for change in comparison.changes):
        console.print(_table(name, [change for change in comparison.changes if change.evaluation == name]))
    for remark in comparison.remarks:
        print(remark)


def _table(name: str, changes: list[Change]) -> Table:
    table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")  # fits 80 columns
    table.add_column("figure")
    for title in ("A", "B", "B - A", "95 % interval", "n", "won / lost", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        table.add_row(phrase(change.figure.replace("_to_", " → ")), *cell_texts(change))
    return table
