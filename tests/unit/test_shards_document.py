"""docs/shards.md: its example makes a data set that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from making_data import png

from clipscale.data.shards import open_dataset

DOCUMENT = Path(__file__).parents[2] / "docs" / "shards.md"


def test_the_example_makes_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("one", "two"):
        (pictures / f"{name}.png").write_bytes(png(len(name)))
    (example,) = [part.partition("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]
    exec(example, {})
    samples = open_dataset("digits").read(0, [0, 1])
    assert [sample.captions for sample in samples if not isinstance(sample, Exception)] == [["a picture of one"], ["a picture of two"]]
