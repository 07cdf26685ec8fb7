"""docs/shards.md: what it says of the format is so, and its examples write and read data sets."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from making_data import png

from clipscale.data.shards import open_dataset
from data_tools.build import build
from data_tools.packing import Packing
from data_tools.rows import Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "shards.md"


def examples() -> list[str]:
    """The document's pieces of Python, in its order."""
    return [part.partition("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]


def built(folder: Path) -> Path:
    """A data set of five pictures in three shards."""
    rows = [Row(str(number), png(number), None, (f"picture {number}", "a colour"), {"label": number}) for number in range(5)]
    build(rows, folder, packing=Packing(samples_per_shard=2), workers=1)
    return folder


def test_a_reader_written_from_the_document_reads_every_sample(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(examples()[1], names)
    folder = built(tmp_path / "out")
    assert [names["read"](str(folder), number) for number in range(5)] == [
        (png(number), [f"picture {number}", "a colour"]) for number in range(5)
    ]


def test_the_tables_of_columns_are_those_of_the_files(tmp_path: Path) -> None:
    folder, text = built(tmp_path / "out"), DOCUMENT.read_text()
    section = text[text.index("**Sidecars**") : text.index("**index.parquet**")]
    named = {word for line in section.splitlines() if line.startswith("| `") for word in re.findall(r"`(\w+)`", line.split("|")[1])}
    named |= {f"{member}_{what}" for member in ("speech", "text", "record") for what in ("offset", "bytes")}
    assert named == set(pyarrow.parquet.read_schema(folder / "000000.parquet").names)
    listed = text[text.index("**index.parquet**") : text.index("`failures.jsonl` has an object")]
    assert set(pyarrow.parquet.read_schema(folder / "index.parquet").names) <= set(re.findall(r"`(\w+)`", listed))


def test_a_tar_takes_headers_and_padding_and_nothing_else(tmp_path: Path) -> None:
    folder = built(tmp_path / "out")
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        expected = sum(512 + (member.size + 511) // 512 * 512 for member in members)
        assert path.stat().st_size == (expected + 1_024 + 10_239) // 10_240 * 10_240
        assert {(member.uid, member.gid, member.uname, member.gname, member.mode, member.mtime) for member in members} == {
            (0, 0, "clipscale", "clipscale", 0o444, 0)
        }
        for member in members:  # what the standard library writes
            data = path.read_bytes()[member.offset : member.offset + 512]
            assert member.tobuf(tarfile.USTAR_FORMAT) == data


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tars it has read open
def test_a_pipeline_as_open_clip_builds_it_reads_the_shards_with_sizes_json(tmp_path: Path) -> None:
    import webdataset

    folder = built(tmp_path / "out")
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sizes == {"000000.tar": 2, "000001.tar": 2, "000002.tar": 1}
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(folder / name) for name in sizes]),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.select(lambda sample: "txt" in sample and any(suffix in sample for suffix in ("png", "jpg", "jpeg", "webp"))),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=lambda image: image.getpixel((0, 0)), text=str),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(3, partial=True),
    )
    batches = [(list(map(tuple, images)), list(texts)) for images, texts in pipeline]
    assert batches == [
        ([(0, 0, 0), (1, 0, 0), (2, 0, 0)], ["picture 0", "picture 1", "picture 2"]),
        ([(3, 0, 0), (4, 0, 0)], ["picture 3", "picture 4"]),
    ]


def test_the_example_makes_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("one", "two"):
        (pictures / f"{name}.png").write_bytes(png(len(name)))
    exec(examples()[0], {})
    samples = open_dataset("digits").read(0, [0, 1])
    assert [sample.captions for sample in samples if not isinstance(sample, Exception)] == [["a picture of one"], ["a picture of two"]]
