"""Captions: what is repaired, what is dropped, and which rows are left out for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from making_data import png

from clipscale.data.shards import Sample, open_dataset
from clipscale.errors import DataError
from data_tools import packing as module
from data_tools.build import build
from data_tools.captions import pack_captions, repair, tidy
from data_tools.packing import BadRow, Packing
from data_tools.rows import Row


@pytest.mark.parametrize(
    ("found", "repaired"),
    [
        ("Tom &amp; Jerry&#39;s &eacute;tude", "Tom & Jerry's étude"),
        ("A &amp;amp;amp; B", "A & B"),
        ("A &amp;amp;amp;amp; B", "A &amp; B"),  # more than three times is no mistake of a page
        ("H<sub>2</sub>O is <b class='x'>wet</b><br/>really<!-- no -->", "H2O is wet really"),
        ("&lt;p&gt;twice wrapped&lt;/p&gt;", "twice wrapped"),
        ("5 < b > 3, <PERSON> and a <3", "5 < b > 3, <PERSON> and a <3"),
        ("e\u0301tude", "\u00e9tude"),
        ("a\u00adb\u200bc\ufeff \u202eabc\u202c \ufffd\ue000!", "abc abc !"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),
        ("tab\tnew\nline\x00\x85nbsp\u00a0wide\u3000end", "tab new line nbsp wide end"),
        ("plain", "plain"),
    ],
)
def test_captions_of_the_web_are_repaired_by_the_stated_rules(found: str, repaired: str | None) -> None:
    assert tidy([repair(found)]) == [found if repaired is None else repaired]


def test_without_the_option_only_control_characters_and_white_space_go() -> None:
    odd = "Tom &amp;  <b>e\u0301</b>\u200b\x07 end"
    assert pack_captions([odd, "", " "], Packing()) == ["Tom &amp; <b>e\u0301</b>\u200b end"]
    assert pack_captions([odd, "Tom & \u00e9 end"], Packing(clean_captions=True)) == ["Tom & \u00e9 end"]


def test_captions_of_other_lengths_are_dropped_and_rows_without_any_left_out() -> None:
    packing = Packing(min_words=2, max_words=3)
    assert pack_captions(["one", "one two", "a b c", "a b c d"], packing) == ["one two", "a b c"]
    with pytest.raises(BadRow, match="caption too short: 1 words: one"):
        pack_captions(["one", "two"], packing)
    with pytest.raises(BadRow, match="caption too long: 4 words"):
        pack_captions(["a b c d", "a b c d e"], packing)
    with pytest.raises(BadRow, match="no caption"):
        pack_captions(["<br>"], Packing(clean_captions=True))
    with pytest.raises(ValueError, match="max_words 1 is less than min_words 2"):
        Packing(min_words=2, max_words=1)


def rows(number: int = 3) -> list[Row]:
    texts = ("a &amp; b", "short", "one two three")
    return [Row(f"row {index}", png(index), None, (texts[index % 3],)) for index in range(number)]


def test_rows_left_out_for_their_captions_are_counted_and_are_no_failures(tmp_path: Path) -> None:
    summary = build(rows(), tmp_path / "out", packing=Packing(clean_captions=True, min_words=2), workers=1, max_bad=0.0)
    assert (summary.samples, summary.failures) == (2, {"caption too short": 1})
    samples = open_dataset(tmp_path / "out").read(0, [0, 1])
    assert [sample.captions for sample in samples if isinstance(sample, Sample)] == [["a & b"], ["one two three"]]
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["row"] == "row 1"
    with pytest.raises(DataError, match=r"holds another data set, of the input \(min_words: 2, asked: 1\)"):
        build(rows(), tmp_path / "out", packing=Packing(clean_captions=True, min_words=1), workers=1)


def test_a_build_that_other_code_began_is_refused_and_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(rows(), tmp_path / "out", packing=Packing(samples_per_shard=1), workers=1, plan_only=True)
    monkeypatch.setattr(module, "TRANSFORMS", module.TRANSFORMS + 1)
    with pytest.raises(DataError, match=r"begun by other code \(.*transforms 2; this is .*transforms 3\).*--overwrite"):
        build(rows(), tmp_path / "out", packing=Packing(samples_per_shard=1), workers=1)
    assert build(rows(), tmp_path / "out", packing=Packing(samples_per_shard=1), workers=1, overwrite=True).samples == 3
