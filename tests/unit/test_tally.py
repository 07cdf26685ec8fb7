"""Progress: what several processes count together, and how it is told."""

from __future__ import annotations

import io
import multiprocessing

import pytest
from rich.console import Console

from data_tools import terminal
from data_tools.pool import Count, run_all
from data_tools.tally import Progress, Tally
from data_tools.terminal import progress_line, progress_text, reasons_text


def count_one(item: int, count: Count) -> int:
    """A job of two rows, of which one fails for the reason of its number."""
    count(Progress(1, bytes=10))
    count(Progress(1, reasons={f"reason {item % 3}": 1}))
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_of_all_processes_are_counted_by_reason(workers: int) -> None:
    seen: list[Progress] = []
    assert sorted(run_all(count_one, range(8), workers=workers, show=seen.append)) == list(range(8))
    assert seen[-1] == Progress(16, 80, {"reason 0": 3, "reason 1": 3, "reason 2": 2})
    assert seen[-1].failed == 8


def test_more_reasons_than_fit_are_counted_together() -> None:
    tally = Tally(multiprocessing.get_context("forkserver"))
    for number in range(40):
        assert tally.add(Progress(1, reasons={f"{number:02d} " + "é" * 60: 1}))
    told = tally.progress()
    assert (told.rows, told.failed, len(told.reasons)) == (40, 40, 32)
    assert told.reasons["other reasons"] == 9
    assert all(len(name.encode()) < 48 for name in told.reasons)
    tally.stop()
    assert not tally.add(Progress(1))


def test_the_text_tells_rows_bytes_rate_time_left_and_reasons() -> None:
    progress = Progress(3_000, 5_000_000, {"missing file": 2, "unreadable image": 30, "a": 1, "b": 1, "c": 1}, "fetched 7")
    told = "3,000 of 9,000 rows · fetched 7 · 5.0 MB · 50 rows/s · 2 min left"
    assert progress_text(progress, 9_000, 50.0) == f"{told} · 35 left out: unreadable image 30, missing file 2, a 1, b 1, ..."
    assert reasons_text(Progress(5)) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_drawn_on_a_terminal_and_written_in_a_log(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=written, force_terminal=is_terminal, width=160))
    monkeypatch.setattr(terminal, "_LOG_S", 0.0)
    with progress_line("packing") as show:
        show(Progress(5, 1_000, {"missing file": 2}), 10)
    text = written.getvalue()
    assert "packing" in text
    assert "2 left out: missing file 2" in text
    assert ("5/10" in text) == is_terminal
    assert ("5 of 10 rows · 1.0 kB" in text) != is_terminal
