"""What `clipscale plan` does: a sweep over nodes with what to change, shown and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text

from clipscale.config import Run
from clipscale.errors import ConfigError, RequestError
from clipscale.planning.advice import Suggestion, suggestions
from clipscale.planning.gpus import find_gpu
from clipscale.planning.page import html_page
from clipscale.planning.plan import Plan, Planner, Row, sweep
from clipscale.planning.record import record
from clipscale.planning.tables import headline, tables


@dataclass(frozen=True)
class Made:
    """Plans by number of nodes, the last one what was asked for, and what would be better."""

    rows: Sequence[Row]
    asked: Plan
    advice: Sequence[Suggestion]


def make(run: Run, *, nodes: int, gpu: str, gpus_per_node: int | None) -> Made:
    """
    Raises:
        RequestError: the GPU is unknown, the numbers make no sense, or the run cannot be shared by so many ranks.
    """
    found = find_gpu(gpu)
    each = gpus_per_node if gpus_per_node is not None else 8 if found.device == "cuda" else 1
    for name, count in (("nodes", nodes), ("gpus-per-node", each)):
        if count < 1:
            raise ConfigError(f"--{name} {count}: a run needs at least 1")
    run.check_world(nodes * each)
    planner = Planner(run, gpu_name=gpu, gpu=found, gpus_per_node=each)
    asked = planner.plan(nodes)
    return Made(sweep(planner, nodes), asked, suggestions(asked))


def show(made: Made, console: Console) -> None:
    """All tables, in the terminal."""
    console.print(Text(headline(made.asked), style="bold"))
    for told in tables(made.rows, made.advice):
        shown = Shown(title=Text(told.title), title_justify="left", show_header=any(told.columns))
        for place, column in enumerate(told.columns):
            shown.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in told.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
        if told.note:
            console.print(Text(told.note, style="dim"))


def write(made: Made, *, json_file: Path | None, page: Path | None) -> None:
    """The files that were asked for.

    Raises:
        RequestError: one of them cannot be written.
    """
    if json_file is not None:
        _write(json_file, json.dumps(record(made.rows, made.advice), indent=1, ensure_ascii=False) + "\n")
    if page is not None:
        _write(page, html_page(made.rows, made.advice))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: the plan cannot be written there: {error}") from None
    print(path)
