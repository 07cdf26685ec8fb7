"""JSON that is larger than memory: read item by item as the standard library reads it whole, in memory that does not grow."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipscale.errors import DataError
from data_tools.rows import _json_stream as module
from data_tools.rows import open_rows
from data_tools.rows._json_stream import list_items, member_items


def value(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value with everything that can be cut in two: numbers, escapes, words, characters of four bytes."""
    texts = ['"', "\\", "\n\u2028", "\u00e9\U0001f600", "null", "]}", "-12", "plain"]
    leaves = [None, True, False, -12, 12345678901234567890, 1.5e-30, "".join(draw.choices(texts, k=4))]
    if depth == 3 or draw.random() < 0.4:
        return draw.choice(leaves)
    if draw.random() < 0.5:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {"".join(draw.choices(texts, k=2)): value(draw, depth + 1) for _ in range(draw.randrange(4))}


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
def test_items_are_what_the_standard_library_reads_wherever_the_text_is_cut(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    draw = random.Random(0)
    for trial in range(60):
        items = [value(draw) for _ in range(draw.randrange(5))]
        text = json.dumps(items, ensure_ascii=trial % 2 == 0, indent=[None, 1][trial % 3 == 0])
        assert list(list_items(io.StringIO(text))) == items
        members = {"a": items, "other": {"a": [1]}, "b": [], "more": [items], "c": 7}
        read = list(member_items(io.StringIO(json.dumps(members)), {"a", "b", "c"}))
        assert read == [*(("a", item) for item in items), ("c", 7)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "expected , or ]"),
        ('[{"a": 1}, {"a": ', "Expecting value at character 17"),
        ('["never closed, ]', "Unterminated string"),
        ("[1] 2", "more follows"),
        ("[1 2]", "expected , or ] at character 3, found 2"),
        ("{}", "expected \\["),
        ("[" * 100_000, "nested too deeply"),
        ('[1, "caf\udce9"]', "not text in the file's encoding: byte 0xe9"),
    ],
)
def test_what_is_no_json_list_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(list_items(io.StringIO(text)))


def test_damage_is_told_without_reading_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 100)
    file = io.StringIO("[1, oops, " + "2, " * 10_000 + "3]")
    with pytest.raises(ValueError, match="Expecting value at character 4"):
        list(list_items(file))
    assert file.tell() <= 200


def test_a_value_that_never_ends_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST", 1 << 12)
    monkeypatch.setattr(module, "_PIECE", 1 << 10)
    file = io.StringIO('["' + "x" * 100_000)
    with pytest.raises(ValueError, match="one value has more than"):
        list(list_items(file))
    assert file.tell() < 20_000


def test_captions_come_to_their_images_whatever_the_order_and_kind_of_ids(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    ids: list[Any] = [1, "1", 2.5, 2**70, None, 7]
    annotations = [{"image_id": name, "caption": f"{name!r}, {time}"} for time in (1, 2) for name in reversed(ids[:-1])]
    images = [{"id": name, "file_name": f"{place}.jpg", "license": 3} for place, name in enumerate(ids)]
    for order in (("annotations", "licenses", "images"), ("images", "annotations", "licenses")):
        parts = {"annotations": annotations, "images": images, "licenses": [{"id": 3, "name": "mine \ud800"}]}
        (tmp_path / "captions.json").write_text(json.dumps({name: parts[name] for name in order}))
        rows = list(open_rows(tmp_path / "captions.json", kind="coco").read())
        assert [row.captions for row in rows] == [(f"{name!r}, 1", f"{name!r}, 2") for name in ids[:-1]]
        assert rows[0].record["license_name"] == "mine \ud800"


def test_a_coco_file_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "in.json").write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}')
    with pytest.raises(DataError, match="of its 1 'images' none has a caption"):
        open_rows(tmp_path / "in.json").guesses()


MEASURED = """
import pathlib, sys
from data_tools.rows import open_rows

def peak_kb():
    return int(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])

def read(path):
    rows = open_rows(pathlib.Path(path))
    rows.guesses()
    return sum(1 for _ in rows.read())

few = read(sys.argv[1]), peak_kb()
many = read(sys.argv[2]), peak_kb()
print(*few, *many)
"""


def written(kind: str, number: int, path: Path) -> Path:
    """A file of `number` samples, about 2 kB each."""
    text = "a caption of about a thousand letters " * 25
    images = ({"id": item, "file_name": "x.jpg", "filename": "x.jpg", "split": "train"} for item in range(number))
    with path.open("w") as file:
        if kind == "list":
            file.write("[" + ",".join(json.dumps({**image, "caption": f"{text}{text}"}) for image in images) + "]")
            return path
        sentences = {"sentids": [1], "sentences": [{"raw": text}, {"raw": f"{text}."}]} if kind == "karpathy" else {}
        file.write('{"images": [' + ",".join(json.dumps({**image, **sentences}) for image in images) + "]")
        if kind == "coco":
            described = ({"image_id": item % number, "caption": f"{text}{item}"} for item in range(2 * number))
            file.write(', "annotations": [' + ",".join(map(json.dumps, described)) + "]")
        file.write("}")
    return path


@pytest.mark.parametrize("kind", ["coco", "karpathy", "list"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").touch()
    few, many = written(kind, 500, tmp_path / "few.json"), written(kind, 15_000, tmp_path / "many.json")
    command = [sys.executable, "-c", MEASURED, str(few), str(many)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, cwd=Path(__file__).parents[2])
    few_rows, few_kb, many_rows, many_kb = map(int, told.stdout.split())
    expected = {"list": (1, 1)}.get(kind, (500, 15_000))  # lines of one file become one sample with all their captions
    assert (few_rows, many_rows) == expected
    assert many.stat().st_size > 25e6
    assert many_kb - few_kb < 15_000 + 33_000 * (kind == "coco")  # whose database may hold 32 MB
