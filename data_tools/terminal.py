"""What commands print: messages as they stand, sizes, and a line of progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from clipscale.errors import DataError

if TYPE_CHECKING:
    from data_tools.pool import Progress

out = Console()
errors = Console(stderr=True)


def say(text: str, *, console: Console = out, style: str = "") -> None:
    """Print text as it stands: no markup, no wrapping, and no half characters from odd file names."""
    console.print(escape(text.encode("utf-8", "replace").decode()), style=style, highlight=False, soft_wrap=True)


@contextmanager
def progress_line(doing: str = "building") -> Iterator[Callable[[Progress, int], None]]:
    """A progress line on stderr: rows, rate, failures, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeRemainingColumn())
    with Bar(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task, started = bar.add_task(doing, total=None, more="planning"), time.monotonic()

        def show(progress: Progress, total: int) -> None:
            rate = progress.rows / max(time.monotonic() - started, 1e-3)
            more = (
                f"{progress.doing}{' · ' if progress.doing else ''}{progress.failed} failed · {size(progress.bytes)} · {rate:,.0f} rows/s"
            )
            bar.update(task, total=total, completed=progress.rows, more=more)

        yield show


@contextmanager
def lines_file(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Writes JSON objects, a line each, to a file; nowhere when there is none.

    Raises:
        DataError: the file cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    try:
        file = path.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    with file:
        yield lambda values: print(json.dumps(dict(values), ensure_ascii=False), file=file)


def size(amount: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1_000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:.1f} TB"
