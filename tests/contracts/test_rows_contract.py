"""What every kind of input keeps to, those added later too."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clipscale.errors import RequestError
from clipscale.settings import find_part, part_names, part_summaries
from data_tools.media import TarMember
from data_tools.rows import Rows, open_rows, rows_kind

NAMES = part_names(Rows.folder)


def images(folder: Path) -> None:
    folder.mkdir()
    for stem in "ba":
        (folder / f"{stem}.jpg").touch()


def folder(place: Path) -> Path:
    images(place / "in")
    for stem in "ba":
        (place / "in" / f"{stem}.txt").write_text(f"caption of {stem}")
    return place / "in"


def table(place: Path) -> Path:
    images(place / "images")
    (place / "in.csv").write_text("file,caption\nb.jpg,caption of b\na.jpg,caption of a\n")
    return place / "in.csv"


def jsonl(place: Path) -> Path:
    images(place / "images")
    (place / "in.jsonl").write_text('{"file": "b.jpg", "caption": "caption of b"}\n{"file": "a.jpg", "caption": "caption of a"}\n')
    return place / "in.jsonl"


def coco(place: Path) -> Path:
    images(place / "images")
    pictures = [{"id": number, "file_name": f"{stem}.jpg"} for number, stem in enumerate("ba")]
    annotations = [{"image_id": number, "caption": f"caption of {stem}"} for number, stem in enumerate("ba")]
    (place / "in.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    return place / "in.json"


def tars(place: Path) -> Path:
    (place / "tars").mkdir()
    with tarfile.open(place / "tars" / "00000.tar", "w") as tar:
        for stem in "ba":
            for suffix, data in (("jpg", b""), ("txt", f"caption of {stem}".encode())):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return place / "tars"


EXAMPLES: dict[str, Callable[[Path], Path]] = {"folder": folder, "table": table, "jsonl": jsonl, "coco": coco, "tars": tars}


def test_every_kind_of_input_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_recognises_its_own_inputs_and_no_other_does(name: str, tmp_path: Path) -> None:
    path = EXAMPLES[name](tmp_path)
    assert [other for other in NAMES if find_part(Rows, other).recognises(path)] == [name]  # type: ignore[type-abstract]
    assert rows_kind(path) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_says_what_it_takes_for_what_and_reads_the_same_twice(name: str, tmp_path: Path) -> None:
    rows = open_rows(EXAMPLES[name](tmp_path))
    assert len(rows.guesses()) >= 2
    first = list(rows.read())
    assert list(rows.read()) == first
    assert sorted((row.image.name, row.captions) for row in first if isinstance(row.image, Path | TarMember)) == [
        ("a.jpg", ("caption of a",)),
        ("b.jpg", ("caption of b",)),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe" * 100], ids=["empty", "noise"])
def test_a_kind_refuses_a_file_of_nonsense_with_a_message(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(RequestError, match=r"input .*/in"):
        open_rows(tmp_path / "in", kind=name).guesses()


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_begins_with_a_line_that_says_what_it_is(name: str) -> None:
    assert part_summaries(Rows.folder)[name].endswith(".")
