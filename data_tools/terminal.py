"""What commands print: messages as they stand, sizes, and a line of progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from clipscale.errors import DataError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar

    from data_tools.tally import Progress

out = Console()
errors = Console(stderr=True)
_LOG_S = 60.0  # between lines of progress in a log
_SHORT_S = 0.5  # before that a rate says nothing
_NAMED = 4  # reasons


def say(text: str, *, console: Console = out, style: str = "") -> None:
    """Print text as it stands: no markup, no wrapping, and no half characters from odd file names."""
    console.print(escape(text.encode("utf-8", "replace").decode()), style=style, highlight=False, soft_wrap=True)


@contextmanager
def progress_line(doing: str = "building") -> Iterator[Callable[[Progress, int], None]]:
    """Progress on stderr: rows, failures by reason, bytes, rate, time left; a line every minute where stderr is no terminal."""
    if not errors.is_terminal:
        yield _Log(doing).show
        return
    with _two_lines(doing) as bar:
        task, pace = bar.add_task(doing, total=None, more="planning"), _Pace()

        def show(progress: Progress, total: int) -> None:
            rate = pace.rate(progress)
            more = " · ".join(filter(None, [progress.doing, size(progress.bytes), f"{rate:,.0f} rows/s"]))
            bar.update(task, total=total, completed=progress.rows, more=more, reasons=reasons_text(progress))

        yield show


def _two_lines(doing: str) -> Bar:
    """A bar, and below it, as soon as there is one, a line of failures by reason."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Lines(Bar):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            reasons = "; ".join(filter(None, (task.fields.get("reasons", "") for task in self.tasks)))
            if reasons:
                yield Text(f"  {reasons}", no_wrap=True, overflow="ellipsis")

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeRemainingColumn())
    return Lines(*columns, console=errors, transient=True)


class _Pace:
    """Rows a second, since there was something to count."""

    def __init__(self) -> None:
        self._begun: float | None = None

    def rate(self, progress: Progress) -> float:
        """Of all rows so far; 0 at first."""
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        return progress.rows / (now - self._begun) if now - self._begun > _SHORT_S else 0.0


class _Log:
    """Progress where nobody can redraw a line: in files and logs of clusters."""

    def __init__(self, doing: str) -> None:
        self._doing, self._pace, self._said = doing, _Pace(), time.monotonic()

    def show(self, progress: Progress, total: int) -> None:
        """Say it, a minute after the last time."""
        rate = self._pace.rate(progress)
        if time.monotonic() - self._said >= _LOG_S:
            self._said = time.monotonic()
            say(f"{self._doing}: {progress_text(progress, total, rate)}", console=errors)


def progress_text(progress: Progress, total: int, rate: float) -> str:
    """What has been done, at this many rows a second, and how long the rest takes at that."""
    left = f"{(total - progress.rows) / rate / 60:,.0f} min left" if rate else ""
    parts = [
        f"{progress.rows:,} of {total:,} rows",
        progress.doing,
        size(progress.bytes),
        f"{rate:,.0f} rows/s",
        left,
        reasons_text(progress),
    ]
    return " · ".join(filter(None, parts))


def reasons_text(progress: Progress) -> str:
    """Failures by reason, the most frequent first; empty when nothing failed."""
    if not progress.failed:
        return ""
    common = sorted(progress.reasons.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{reason} {number:,}" for reason, number in common[:_NAMED])
    return f"{progress.failed:,} left out: {named}{', ...' if len(common) > _NAMED else ''}"


@contextmanager
def lines_file(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Writes JSON objects, a line each, to a file; nowhere when there is none.

    Raises:
        DataError: the file cannot be written.
    """
    with text_file(path) as write:
        yield lambda values: write(json.dumps(dict(values), ensure_ascii=False))


@contextmanager
def text_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Writes lines to a file; nowhere when there is none.

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
        yield lambda line: print(line, file=file)


def size(amount: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1_000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:.1f} TB"
