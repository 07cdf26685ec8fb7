"""Occurrences: the same counts as of values held in memory, in memory that does not grow."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from data_tools import occurrences as module
from data_tools.occurrences import Counted, Occurrences, digest_of


@pytest.mark.parametrize("held", [1 << 20, 1_000, 37, 1])
def test_counts_are_those_of_values_held_in_memory(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD", held)
    draw = random.Random(held)
    values = [str(draw.choice([0, draw.randrange(5), draw.randrange(2_000)])) for _ in range(700 if held == 1 else 5_000)]
    occurrences = Occurrences(tmp_path / "values")
    for place, value in enumerate(values):
        occurrences.add(digest_of(value), 3 * place)
    counts, places = Counter(values), dict[str, list[int]]()
    for place, value in enumerate(values):
        places.setdefault(value, []).append(3 * place)
    counted = occurrences.counted(12)
    assert (counted.distinct, counted.repeats) == (len(counts), len(values) - len(counts))
    assert counted.common == [(places[value][0], number) for value, number in counts.most_common(12)]
    assert counted.repeated == [found[:8] for found in places.values() if len(found) > 1][:12]


def test_nothing_counted_is_nothing(tmp_path: Path) -> None:
    assert Occurrences(tmp_path / "values").counted(5) == Counted(0, 0, [], [])


def test_memory_and_files_do_not_grow_with_one_value_that_comes_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD", 2_000)
    occurrences = Occurrences(tmp_path / "values")
    for place in range(100_000):
        occurrences.add(digest_of("always"), place)
    assert sum(path.stat().st_size for path in (tmp_path / "values").iterdir()) <= 100_000 / 2_000 * module.PLACES * 32
    assert occurrences.counted(1) == Counted(1, 99_999, [(0, 100_000)], [list(range(8))])


def peak(number: int, folder: Path) -> int:
    """Most bytes held while so many different values are counted."""
    tracemalloc.start()
    occurrences = Occurrences(folder)
    for place in range(number):
        occurrences.add(digest_of(str(place)), place)
    assert occurrences.counted(3).distinct == number
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def test_memory_does_not_grow_with_the_number_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD", 1_000)
    # The smaller of two: whatever else the process allocates by the way is seen too.
    few, many = (min(peak(number, tmp_path / f"{number} {again}") for again in (1, 2)) for number in (5_000, 40_000))
    assert many < 1.5 * few < 1_000_000  # 40,000 entries take 1,280,000 bytes
