"""Report: a run folder becomes one self-contained HTML page, one JSON file, and a table for the terminal."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipscale.errors import RunFolderError
from clipscale.report.axis import count, number
from clipscale.report.evaluation_section import figure_name, interval_text, value_text
from clipscale.report.page import html_page
from clipscale.report.records import RunRecords, read_run

if TYPE_CHECKING:
    from rich.table import Table


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and `report.json` into a folder that holds a run, an evaluation or both; returns the page's path.

    Raises:
        RunFolderError: the folder holds neither, one of its files is damaged, or it cannot be written.
    """
    run = read_run(run_folder)
    page = run_folder / "report.html"
    _write_whole(page, html_page(run))
    _write_whole(run_folder / "report.json", json.dumps(_summary(run), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return page


def report_table(run_folder: Path) -> Table:
    """Every evaluated figure with its interval and n, for the terminal; the last step's numbers when nothing was evaluated.

    Raises:
        RunFolderError: as `write_report`.
    """
    run = read_run(run_folder)
    return _figures(run) if run.evaluations else _last_numbers(run)


def _figures(run: RunRecords) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(run.name))
    for column in ("evaluation", "figure"):
        table.add_column(column, overflow="fold")
    for column in ("value", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, evaluation in run.evaluations.items():
        for index, figure in enumerate(evaluation.figures):
            shown = (name if index == 0 else "", figure_name(figure), value_text(figure), interval_text(figure), count(figure.n))
            table.add_row(*(Text(text) for text in shown), end_section=index == len(evaluation.figures) - 1)
    return table


def _last_numbers(run: RunRecords) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("number", title=Text(f"{run.name}, step {run.last_step}"))
    table.add_column("value", justify="right")
    for name, value in _last_values(run).items():
        table.add_row(Text(name), Text("not finite" if value is None else number(value)))
    return table


def _last_values(run: RunRecords) -> dict[str, float | None]:
    """The last value of every number in metrics.jsonl; None when it is not finite."""
    last = {".".join(place): float(curve.values[-1]) for place, curve in run.metrics.items() if place != ("step",)}
    return {name: value if math.isfinite(value) else None for name, value in last.items()}


def _summary(run: RunRecords) -> dict[str, Any]:
    """What report.json holds: the run in numbers, without its curves."""
    seconds = run.timings.get(("seconds",))
    return {
        "name": run.name,
        "step": run.last_step,
        "last": _last_values(run),
        "seconds_in_steps": float(seconds.values.sum()) if seconds else None,
        "evaluations": {name: evaluation.to_json() for name, evaluation in run.evaluations.items()},
        "events": run.events,
        "environment": run.environment,
        "config": run.config,
        "warnings": run.warnings,
    }


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunFolderError(f"{path} cannot be written: {error.strerror}; free space or fix the permissions of {path.parent}") from None


__all__ = ["report_table", "write_report"]
