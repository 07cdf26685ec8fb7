"""What every source keeps: all of the data set, told before it is read, and found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from making_data import png, write_dataset

from clipscale.data.sample import Sample
from clipscale.data.sources import Source, StreamedSource
from clipscale.errors import DataError
from clipscale.settings import Settings, find_part, part_names

SOURCES = part_names(Source.folder)
STREAMED = [name for name in SOURCES if issubclass(find_part(Source, name), StreamedSource)]
INDEXED = [name for name in SOURCES if name not in STREAMED]


class Config(Settings):
    """A configuration with a source in it."""

    source: Source


def made(name: str, folder: Path, **settings: object) -> Source:
    return Config.model_validate({"source": {"name": name, "url": str(folder), **settings}}).source


def opened(source: Source) -> object:
    return source.open_stream() if isinstance(source, StreamedSource) else source.open()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_configured_by_name_and_says_its_name(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path, weight=2.0)
    assert (source.weight, source.cache_decoded) == (2.0, False)
    assert source.model_dump()["name"] == name


@pytest.mark.parametrize("name", INDEXED)
def test_a_source_gives_every_sample_as_stored(name: str, tmp_path: Path) -> None:
    opened = made(name, write_dataset(tmp_path, [2, 3])).open()
    assert opened.samples.tolist() == [2, 3]
    assert (opened.totals["samples"], opened.totals["images"], opened.totals["recordings"]) == (5, 5, 0)
    samples = [sample for shard, size in enumerate(opened.samples) for sample in opened.read(shard, range(size))]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.key for sample in samples if isinstance(sample, Sample)] == [f"{number:06d}" for number in range(5)]
    assert [sample.image for sample in samples if isinstance(sample, Sample)] == [png(number) for number in range(5)]


@pytest.mark.parametrize("name", INDEXED)
def test_a_sources_fingerprint_is_that_of_its_data(name: str, tmp_path: Path) -> None:
    prints = [
        made(name, write_dataset(tmp_path / folder, sizes)).open().fingerprint for folder, sizes in (("a", [2]), ("b", [2]), ("c", [3]))
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_not_there_is_told_when_it_is_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        opened(made(name, tmp_path / "nowhere"))


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_source_gives_every_sample_of_every_shard_and_refuses_to_be_looked_up(name: str, tmp_path: Path) -> None:
    source = made(name, write_dataset(tmp_path, [2, 3]))
    assert isinstance(source, StreamedSource)
    stream = source.open_stream()
    samples = [sample for shard in range(len(stream.shards)) for sample in stream.read_shard(shard)]
    assert [sample.key for sample in samples] == [f"{number:06d}" for number in range(5)]
    assert [sample.image for sample in samples if isinstance(sample, Sample)] == [png(number) for number in range(5)]
    with pytest.raises(DataError, match="clipscale-shards index"):
        source.open()
