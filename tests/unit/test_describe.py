"""Describe: what a data set holds, in numbers and as a page."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from clipscale.errors import DataError
from data_tools.build import build
from data_tools.describe import Description, Duplicates, Spread, Texts, describe, duration
from data_tools.packing import Packing
from data_tools.page import write_page
from data_tools.rows import Row


def picture(colour: int, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def recording(seconds: float) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(int(16_000 * seconds), 0.1), 16_000, format="FLAC")
    return stream.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = [
        Row("a", picture(1, (100, 50)), None, ("a red box", "red"), {"label": "box"}),
        Row("b", picture(2, (60, 80)), None, ("red",), {"label": "box"}),
        Row("c", picture(1, (100, 50)), None, ("<script>alert('&')</script>",), {"label": "<b>", "note": "<i>"}),
        Row("d", None, recording(2.0), ("turn it on",), {"speaker": "ann", "slots": {"action": "on", "object": "it"}}),
        Row("e", None, recording(60.5), ("red",), {"speaker": "bob", "slots": {"action": "on"}}),
    ]
    build(rows, tmp_path / "set", packing=Packing(samples_per_shard=2), workers=1)
    return tmp_path / "set"


@pytest.fixture
def description(dataset: Path) -> Description:
    return describe(str(dataset))


def test_counts_are_those_of_the_rows(description: Description) -> None:
    totals = description.totals
    assert (totals["samples"], totals["images"], totals["recordings"], totals["captions"], totals["seconds"]) == (5, 3, 2, 6, 62.5)
    assert description.shards == 3
    assert (description.captions.distinct, description.captions.common[0]) == (4, ("red", 3))
    assert description.fields["label"] == Texts(2, [("box", 2), ("<b>", 1)])
    assert description.fields["speaker"] == Texts(2, [("ann", 1), ("bob", 1)])
    assert description.fields["intent"] == Texts()
    assert description.slots == {"action": 2, "object": 1}


def test_spreads_are_those_of_the_rows(description: Description) -> None:
    values = {spread.name: np.repeat(spread.values, spread.counts).tolist() for spread in description.spreads}
    assert values == {
        "longer side": [80, 100, 100],
        "recording length": [2.0, 60.5],
        "caption length": [1, 1, 1, 1, 3, 3],
        "captions": [1, 1, 1, 1, 2],
    }


@pytest.mark.parametrize("values", [[3.0], [1, 2], [1, 1, 5], [4, 1, 1, 2, 2, 9, 9, 9]])
def test_the_middle_is_the_median(values: list[float]) -> None:
    found, counts = np.unique(values, return_counts=True)
    assert Spread("x", "y", found, counts).middle == np.median(values)


def test_samples_with_the_same_bytes_are_duplicates(description: Description) -> None:
    assert description.duplicates == Duplicates(1, [["000000000000", "000001000000"]])


def test_the_text_tells_the_counts(description: Description) -> None:
    text = "\n".join(description.lines())
    for part in (
        "5 samples in 3 shards",
        "recordings: 2, 1 min 2 s in all",
        "captions: 6, 4 different",
        "box (2)",
        "action (2)",
        "3 × red",
    ):
        assert part in text
    assert "000000000000 = 000001000000" in text


def test_the_page_shows_every_sample_escapes_everything_and_needs_nothing_else(description: Description, tmp_path: Path) -> None:
    write_page(description, tmp_path / "page.html", num_samples=10)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "<i>" not in page
    sources = re.findall(r"""(?:src|href)=['"]([^'"]*)""", page)
    assert [source.partition(";")[0] for source in sources] == ["data:image/jpeg"] * 3 + ["data:audio/flac"] * 2
    assert base64.b64decode(sources[3].partition(",")[2]) == recording(2.0)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_the_page_spreads_the_samples_it_shows(description: Description, tmp_path: Path) -> None:
    write_page(description, tmp_path / "page.html", num_samples=2)
    page = (tmp_path / "page.html").read_text()
    assert "2 of 5, evenly spread" in page
    assert re.findall(r"<small>(\d{12})", page) == ["000000000000", "000002000000"]


def test_a_page_that_cannot_be_written_says_so(description: Description, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_page(description, tmp_path / "nowhere" / "page.html", num_samples=1)


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 0 s"), (3_599, "59 min 59 s"), (7_380, "2 h 3 min")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
