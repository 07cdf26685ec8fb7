"""Build: from rows to shards, whatever the rows are and whatever gets in the way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from clipscale.data.shards import open_dataset
from clipscale.errors import ConfigError, DataError, RunError
from data_tools.build import BuildSummary, build
from data_tools.packing import Packing
from data_tools.rows import Row, open_rows
from data_tools.tally import Progress


def picture(seed: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def photos(folder: Path, number: int) -> Path:
    folder.mkdir()
    for index in range(number):
        (folder / f"{index:03d}.jpg").write_bytes(picture(index))
        (folder / f"{index:03d}.txt").write_text(f"photo  number {index}\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(source: Path, output: Path, **options: Any) -> BuildSummary:
    options.setdefault("workers", 1)
    return build(open_rows(source), output, packing=Packing(samples_per_shard=4), **options)


def test_plain_tars_hold_every_file_unchanged_with_its_caption(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 10)
    summary = make(source, tmp_path / "out")
    assert (summary.samples, summary.shards, summary.failures) == (10, 3, {})
    names, media = [], []
    for shard in ("000000", "000001", "000002"):
        with tarfile.open(tmp_path / "out" / f"{shard}.tar") as tar:
            names += tar.getnames()
            media += [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    assert names[:4] == ["000000000000.jpg", "000000000000.txt", "000000000000.json", "000000000001.jpg"]
    assert media == [picture(index) for index in range(10)]
    assert open_dataset(tmp_path / "out").shards == ["000000", "000001", "000002"]
    sample = open_dataset(tmp_path / "out").read(1, [2])[0]
    assert sample.captions == ["photo number 6"]  # type: ignore[union-attr]


def test_the_finished_folder_holds_the_data_set_and_nothing_else(tmp_path: Path) -> None:
    make(photos(tmp_path / "in", 5), tmp_path / "out")
    shards = [f"00000{number}.{suffix}" for number in (0, 1) for suffix in ("parquet", "tar")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *shards,
        "build.json",
        "index.parquet",
        "index.sha256",
        "sizes.json",
    ]


def test_the_number_of_processes_and_the_place_of_the_input_change_no_byte(tmp_path: Path) -> None:
    make(photos(tmp_path / "in", 10), tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    make(photos(tmp_path / "elsewhere" / "in", 10), tmp_path / "two", workers=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    del one["build.json"], two["build.json"]  # says where the input was and when it was changed
    assert one == two


def test_building_again_keeps_the_shards_and_changes_no_byte(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 6)
    make(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    written = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    assert make(source, tmp_path / "out").reused_shards == 2
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == written


@pytest.mark.parametrize("lost", ["000001.tar", "000000.parquet", "index.parquet"])
def test_building_again_restores_what_was_lost(tmp_path: Path, lost: str) -> None:
    source = photos(tmp_path / "in", 6)
    make(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()

    def look(*_: object) -> None:
        assert not (tmp_path / "out" / "index.parquet").exists()  # a kill now must not leave half a data set that looks whole

    make(source, tmp_path / "out", show=look)
    assert contents(tmp_path / "out") == before


def test_a_build_that_stopped_half_way_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 12)
    make(source, tmp_path / "whole")
    (tmp_path / "out" / ".000009.tar.tmp-1").parent.mkdir()
    (tmp_path / "out" / ".000009.tar.tmp-1").write_bytes(b"left by a kill")

    def stop(progress: Progress, total: int) -> None:
        assert total == 12
        if progress.rows >= 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.pool._LOOK_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out", show=stop)
    assert not (tmp_path / "out" / "index.parquet").exists()
    assert (tmp_path / "out" / "000000.tar").exists()
    assert len(list((tmp_path / "out" / ".build").glob("*.json"))) == 1
    assert make(source, tmp_path / "out").reused_shards == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def broken_rows(tmp_path: Path) -> list[Row]:
    """Thirty good rows, and one of each kind of failure."""
    good = [Row(f"good {index}", picture(index), None, ("fine",)) for index in range(30)]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(picture(99)[:-40])
    return [
        *good,
        Row("gone", tmp_path / "gone.jpg", None, ("gone",)),
        Row("cut", cut, None, ("cut",)),
        Row("silent", picture(1), None, (" \n", "")),
        Row("none", None, None, ("none",)),
        Row("noise", None, b"no sound at all", ("noise",)),
        Row("folder", tmp_path, None, ("folder",)),
    ]


def test_rows_that_fail_are_counted_by_reason_and_listed(tmp_path: Path) -> None:
    summary = build(broken_rows(tmp_path), tmp_path / "out", packing=Packing(samples_per_shard=8), workers=1, max_bad=0.2)
    assert summary.samples == 30
    assert summary.failures == {
        "missing file": 1,
        "unreadable image": 1,
        "no caption": 1,
        "no image or recording": 1,
        "unreadable recording": 1,
        "unreadable file": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [failure["row"] for failure in listed] == ["gone", "cut", "silent", "none", "noise", "folder"]
    assert listed[0]["detail"] == str(tmp_path / "gone.jpg")


@pytest.mark.timeout(30)
def test_a_pipe_among_the_files_fails_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = [Row("good", picture(0), None, ("good",)), Row("pipe", tmp_path / "pipe.jpg", None, ("pipe",))]
    assert build(rows, tmp_path / "out", workers=1, max_bad=0.5).failures == {"unreadable file": 1}


def test_too_many_failures_end_the_build_and_more_tolerance_finishes_it_from_there(tmp_path: Path) -> None:
    rows, packing = broken_rows(tmp_path), Packing(samples_per_shard=8)
    with pytest.raises(DataError, match=r"1 of 36 rows cannot be packed \(missing file 1\); first: gone: .*say --max-bad 0\.028"):
        build(rows, tmp_path / "out", packing=packing, workers=1)
    assert not (tmp_path / "out").exists()  # what can be known before work is said before work
    with pytest.raises(RunError, match=r"6 of 36 rows failed.*first: gone.*--max-bad 0\.167"):
        build(rows, tmp_path / "out", packing=packing, workers=1, max_bad=0.028)
    assert not (tmp_path / "out" / "index.parquet").exists()
    assert build(rows, tmp_path / "out", packing=packing, workers=1, max_bad=0.167).reused_shards == 5


def test_when_every_row_fails_there_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="2 of 2 rows failed"):
        build([Row("a", b"x", None, ("a",)), Row("b", tmp_path / "b", None, ("b",))], tmp_path / "out", workers=1, max_bad=1.0)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_shard_whose_rows_all_failed_is_left_out(tmp_path: Path) -> None:
    rows = [Row("a", b"x", None, ("a",)), Row("b", picture(0), None, ("b",))]
    summary = build(rows, tmp_path / "out", packing=Packing(samples_per_shard=1), workers=1, max_bad=0.5)
    assert (summary.samples, summary.shards) == (1, 1)
    assert open_dataset(tmp_path / "out").shards == ["000001"]


def test_rows_beyond_limits_are_counted_and_listed_and_are_no_failures(tmp_path: Path) -> None:
    small = Row("small", picture(9, size=(20, 20)), None, ("small",))
    rows = [Row("fine", picture(0), None, ("fine",)), small]
    summary = build(rows, tmp_path / "out", packing=Packing(min_side=30), workers=1, max_bad=0.0)
    assert (summary.samples, summary.failures) == (1, {"image too small": 1})
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["row"] == "small"
    with pytest.raises(RunError, match=r"1 of 1 rows failed \(image too small 1\)"):
        build([small], tmp_path / "none", packing=Packing(min_side=30), workers=1)


def test_only_rows_that_fulfil_the_condition_are_packed(tmp_path: Path) -> None:
    photos(tmp_path / "in", 6)
    lines = [f"{index:03d}.jpg,photo {index},{'en' if index % 2 else 'de'},{100 * index}" for index in range(6)]
    (tmp_path / "in" / "t.csv").write_text("\n".join(["file,text,lang,width", *lines]))
    table = open_rows(tmp_path / "in" / "t.csv")
    build(table, tmp_path / "out", packing=Packing(where="lang == 'en' and width > 100 and words(text) == 2"), workers=1)
    samples = open_dataset(tmp_path / "out").read(0, [0, 1])
    assert [sample.record["width"] for sample in samples] == ["300", "500"]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"there is no column 'langg', did you mean 'lang'\? \(there are: caption, captions, file, lang"):
        build(table, tmp_path / "no", packing=Packing(where="langg == 'en'"), workers=1)
    with pytest.raises(DataError, match="holds no rows for which lang == 'fr'"):
        build(table, tmp_path / "no", packing=Packing(where="lang == 'fr'"), workers=1)
    assert not (tmp_path / "no").exists()


def test_no_rows_means_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        build([], tmp_path / "new" / "out", workers=1)
    assert not (tmp_path / "new" / "out").exists()


def test_another_data_set_in_the_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    make(photos(tmp_path / "in", 4), tmp_path / "out")
    before = contents(tmp_path / "out")
    other = photos(tmp_path / "other", 5)
    with pytest.raises(DataError, match=r"holds another data set, of .*/in \(input: .*--overwrite"):
        make(other, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert make(other, tmp_path / "out", overwrite=True).samples == 5
    assert not (tmp_path / "out" / ".build").exists()


def test_a_disk_that_is_too_small_for_the_images_is_refused_before_any_work(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 4)
    needed = sum(path.stat().st_size for path in source.glob("*.jpg"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
        with pytest.raises(DataError, match="the disk has room for"):
            make(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
        make(source, tmp_path / "out")


def test_files_changed_since_are_packed_anew_even_when_as_long_as_before(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 6)
    make(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    changed = picture(2)[:-3] + b"\0\xff\xd9"
    (source / "002.jpg").write_bytes(changed)
    assert make(source, tmp_path / "out").reused_shards == 0
    assert open_dataset(tmp_path / "out").read(0, [2])[0].image == changed  # type: ignore[union-attr]
    (source / "002.jpg").write_bytes(picture(2))
    make(source, tmp_path / "out")
    after = contents(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {"build.json"}  # which holds the files' dates


def test_rows_changed_since_make_it_another_data_set(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 4)
    make(source, tmp_path / "out")
    (source / "002.txt").write_text("another caption")
    with pytest.raises(DataError, match="its rows have changed since"):
        make(source, tmp_path / "out")


def test_foreign_files_in_the_output_are_refused_even_with_overwrite(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other things \(thesis.doc\)"):
        make(source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "thesis.doc").rename(tmp_path / "out" / "000000.tar")
    with pytest.raises(DataError, match="not built here"):
        make(source, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000.tar"]


def test_a_file_in_the_way_of_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="a file is in the way"):
        make(photos(tmp_path / "in", 1), tmp_path / "out")


def test_two_builds_cannot_work_on_one_output(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 4)

    def again(*_: object) -> None:
        make(source, tmp_path / "out")

    with pytest.raises(DataError, match="another build is at work"):
        make(source, tmp_path / "out", show=again)


def test_names_and_texts_that_utf8_cannot_hold_are_packed_all_the_same(tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9.jpg"  # a file name in latin-1, as Python sees it
    odd.write_bytes(picture(0))
    gone = Row("gone", tmp_path / "g\udce9.jpg", None, ("gone",))
    build([Row(odd.name, odd, None, ("half \ud800 a\x00 character",), {"note": "\ud800"}), gone], tmp_path / "out", workers=1, max_bad=0.5)
    sample = open_dataset(tmp_path / "out").read(0, [0])[0]
    assert sample.captions == ["half ? a character"]  # type: ignore[union-attr]
    assert sample.record["note"] == "?"  # type: ignore[union-attr]
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["detail"] == f"{tmp_path}/g?.jpg"


def test_the_plan_holds_one_row_group_a_shard(tmp_path: Path) -> None:
    def look(*_: object) -> None:
        plan = pyarrow.parquet.ParquetFile(tmp_path / "out" / ".build" / "plan.parquet")
        assert [plan.metadata.row_group(group).num_rows for group in range(plan.num_row_groups)] == [4, 4, 1]

    make(photos(tmp_path / "in", 9), tmp_path / "out", show=look)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tar it has read open
def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    make(photos(tmp_path / "in", 4), tmp_path / "out")
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "000000.tar"), shardshuffle=False)
    samples = [(sample["__key__"], sample["jpg"], sample["txt"]) for sample in dataset]
    assert samples == [(f"00000000000{index}", picture(index), f"photo number {index}".encode()) for index in range(4)]
