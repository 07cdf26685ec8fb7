"""Retry: only what failed, in new shards; whole shards untouched; a kill anywhere makes no sample come twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from making_data import png

from clipscale.data.shards import Sample, open_dataset
from clipscale.errors import DataError
from data_tools import retry as module
from data_tools.build import build
from data_tools.packing import Packing
from data_tools.retry import retry
from data_tools.rows import Row
from data_tools.verify import verify


def sums(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def captions(folder: Path | str) -> list[str]:
    index = open_dataset(folder)
    samples = [sample for shard in range(len(index.shards)) for sample in index.read(shard, range(int(index.samples[shard])))]
    return [sample.captions[0] for sample in samples if isinstance(sample, Sample)]


def reasons(folder: Path) -> dict[str, str]:
    path = folder / "failures.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["row"]: line["reason"] for line in lines}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Seven rows in shards of three; three files are missing, one is too small."""
    (tmp_path / "in").mkdir()
    rows = []
    for number in range(7):
        path = tmp_path / "in" / f"{number}.png"
        if number not in (1, 4, 5):
            path.write_bytes(png(number, size=4 if number == 2 else 16))
        rows.append(Row(f"row {number}", image=path, captions=(f"caption {number}",), record={"label": number}))
    build(rows, tmp_path / "set", packing=Packing(samples_per_shard=3, min_side=8), workers=1, max_bad=1.0)
    assert set(reasons(tmp_path / "set")) == {"row 1", "row 2", "row 4", "row 5"}
    return tmp_path / "set"


def mend(dataset: Path, *numbers: int) -> None:
    for number in numbers:
        (dataset.parent / "in" / f"{number}.png").write_bytes(png(number, size=16))


def test_mended_rows_are_added_behind_and_whole_shards_are_untouched(dataset: Path) -> None:
    before = sums(dataset, "00000[0-2].*")
    mend(dataset, 1, 5)
    summary = retry(dataset, workers=1)
    assert (summary.tried, summary.samples, summary.shards, summary.failures) == (3, 2, ["000003"], {"missing file": 1})
    assert sums(dataset, "00000[0-2].*") == before
    assert captions(dataset) == [f"caption {number}" for number in (0, 3, 6, 1, 5)]
    assert reasons(dataset) == {"row 2": "image too small", "row 4": "missing file"}
    assert not verify(str(dataset), found=lambda _: None, workers=1).reasons
    mend(dataset, 4)
    assert retry(dataset, workers=1).shards == ["000004"]
    assert set(reasons(dataset)) == {"row 2"}
    assert retry(dataset, workers=1).tried == 0
    assert sorted(path.name for path in dataset.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("where", ["_Retry._stage", "write_index", "_take_over"])
def test_a_retry_that_dies_anywhere_is_finished_by_the_next(dataset: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying before a step, and, for the last, after the index already names the new shards."""
    mend(dataset, 1, 4)

    class Died(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        owner, _, name = where.rpartition(".")
        patched.setattr(getattr(module, owner) if owner else module, name, die)
        with pytest.raises(Died):
            retry(dataset, workers=1)
    retry(dataset, workers=1)
    assert captions(dataset) == [f"caption {number}" for number in (0, 3, 6, 1, 4)]
    assert {row for row, reason in reasons(dataset).items() if reason == "missing file"} == {"row 5"}
    assert not verify(str(dataset), found=lambda _: None, workers=1).reasons


@pytest.mark.parametrize("where", ["_Retry._stage", "write_index", "_take_over"])
def test_a_retry_in_a_store_that_dies_anywhere_is_finished_by_the_next(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem.store.clear()
    url, store = "memory://bucket/set", MemoryFileSystem()
    path = tmp_path / "1.png"
    rows = [Row(f"row {number}", image=png(number) if number != 1 else path, captions=(f"caption {number}",)) for number in range(4)]
    rows.append(Row("gone", image=tmp_path / "gone.png", captions=("gone",)))
    build(rows, url, packing=Packing(samples_per_shard=3), max_bad=1.0)
    path.write_bytes(png(1))

    class Died(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        owner, _, name = where.rpartition(".")
        patched.setattr(getattr(module, owner) if owner else module, name, die)
        with pytest.raises(Died):
            retry(url)
    retry(url)
    assert captions(url) == [f"caption {number}" for number in (0, 2, 3, 1)]
    assert [json.loads(line)["row"] for line in store.cat_file("/bucket/set/failures.jsonl").splitlines()] == ["gone"]
    assert not verify(url, found=lambda _: None, workers=1).reasons
    assert not [name for name in store.find("/bucket/set") if "/." in name]
    MemoryFileSystem.store.clear()


def test_building_again_after_a_retry_changes_nothing(dataset: Path) -> None:
    mend(dataset, 1)
    retry(dataset, workers=1)
    assert len(captions(dataset)) == 4
    with pytest.raises(DataError, match="no whole data set"):
        retry(dataset.parent / "in", workers=1)
