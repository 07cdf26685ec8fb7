"""Merge, split, reshard: every member byte for byte, keys unique, parts that share nothing, the same bytes after any interruption."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from making_data import png, recording, tone, write_dataset

from clipscale.data.shards import ShardWriter, open_dataset, write_index
from clipscale.errors import ConfigError, DataError, RunError
from data_tools import reshard as module
from data_tools.output import StoreOutput
from data_tools.reshard import Choice, reshard
from data_tools.split import filter_choice, part_of, split_choices
from data_tools.verify import verify


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every tar, as plain tar tells them."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def keys(folder: Path) -> list[str]:
    return sorted({name.partition(".")[0] for name in members(folder)})


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def whole(folder: Path) -> bool:
    return not verify(str(folder), found=lambda _: None, workers=1).reasons


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """40 recordings of 8 speakers, all written alike but for one that a stranger wrote: its record is not in our spelling."""
    folder = tmp_path / "spoken"
    folder.mkdir()
    with ShardWriter(folder, "000000") as writer:
        for number in range(40):
            record = {"speaker": f"s{number % 8}", "number": number}
            writer.write(f"k{number:03d}", captions=[f"word {number}"], speech=recording(tone(0.05 + 0.01 * number)), record=record)
    write_index(folder, [writer.info])
    return folder


def test_merged_samples_keep_every_byte_and_keys_become_unique(tmp_path: Path) -> None:
    first, second = write_dataset(tmp_path / "a", [3, 2]), write_dataset(tmp_path / "b", [2], speech=True)
    reshard([str(first), str(second)], tmp_path / "all", samples_per_shard=4, workers=2)
    expected = {f"0-{name}": data for name, data in members(first).items()} | {f"1-{name}": data for name, data in members(second).items()}
    assert members(tmp_path / "all") == expected
    assert open_dataset(tmp_path / "all").samples.tolist() == [4, 3]
    assert whole(tmp_path / "all")


def test_reshard_changes_sizes_and_nothing_else(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "a", [3, 4], speech=True)
    reshard([str(source)], tmp_path / "b", samples_per_shard=2, workers=1)
    assert members(tmp_path / "b") == members(source)
    assert open_dataset(tmp_path / "b").samples.tolist() == [2, 2, 2, 1]
    again = open_dataset(tmp_path / "b").sidecar(1).columns
    once = open_dataset(source).sidecar(0).columns
    assert [again[name][0] for name in ("width", "frames", "sha256", "captions")] == [
        once[name][2] for name in ("width", "frames", "sha256", "captions")
    ]
    assert whole(tmp_path / "b")


def test_after_an_interruption_the_same_command_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_dataset(tmp_path / "a", [5, 4])
    reshard([str(source)], tmp_path / "b", samples_per_shard=2, workers=1)
    copied = module._copy_shard

    def dies(job: module._Job, count: object) -> object:
        if job.number == 3:
            raise KeyboardInterrupt
        return copied(job, count)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module, "_copy_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            reshard([str(source)], tmp_path / "c", samples_per_shard=2, workers=1)
    assert not (tmp_path / "c" / "index.parquet").exists()
    assert reshard([str(source)], tmp_path / "c", samples_per_shard=2, workers=1).reused_shards == 3
    assert sums(tmp_path / "c") == sums(tmp_path / "b")


def test_an_interrupted_copy_into_a_store_goes_on_and_ends_with_the_bytes_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_dataset(tmp_path / "a", [5, 4])
    reshard([str(source)], tmp_path / "b", samples_per_shard=2, workers=1)
    MemoryFileSystem.store.clear()
    published = StoreOutput.publish

    def dies(self: StoreOutput, *names: str) -> None:
        if "000003.tar" in names:
            raise KeyboardInterrupt
        published(self, *names)

    with monkeypatch.context() as patched:
        patched.setattr(StoreOutput, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            reshard([str(source)], "memory://bucket/c", samples_per_shard=2)
    store = MemoryFileSystem()
    assert not store.exists("/bucket/c/index.parquet")
    assert reshard([str(source)], "memory://bucket/c", samples_per_shard=2).reused_shards == 3
    assert {path.rpartition("/")[2]: hashlib.sha256(store.cat_file(path)).hexdigest() for path in store.find("/bucket/c")} == sums(
        tmp_path / "b"
    )
    with pytest.raises(DataError, match="one of the data sets to read"):
        reshard(["memory://bucket/c"], "memory://bucket/c/")
    MemoryFileSystem.store.clear()


def test_no_speaker_is_in_two_parts_and_every_sample_is_in_one(spoken: Path, tmp_path: Path) -> None:
    speakers = {}
    for name, choice in split_choices(str(spoken), ["train=0.5", "test=0.5"], by="speaker", seed=0).items():
        reshard([str(spoken)], tmp_path / name, choice=choice, workers=1)
        index = open_dataset(tmp_path / name)
        speakers[name] = {sample.record["speaker"] for sample in index.read(0, range(int(index.samples[0])))}  # type: ignore[union-attr]
    assert not speakers["train"] & speakers["test"]
    assert sorted(keys(tmp_path / "train") + keys(tmp_path / "test")) == [f"k{number:03d}" for number in range(40)]


def test_fractions_are_those_asked_for_and_hold_when_the_data_grow() -> None:
    parts = [part_of(f"speaker {number}", [0.8, 0.1], seed=3) for number in range(20_000)]
    # 4 standard deviations of a binomial of 20,000
    assert abs(parts.count(0) - 16_000) < 4 * 56.6
    assert abs(parts.count(1) - 2_000) < 4 * 42.5
    assert abs(parts.count(None) - 2_000) < 4 * 42.5
    assert parts[:100] == [part_of(f"speaker {number}", [0.8, 0.1], seed=3) for number in range(100)]
    assert parts[:100] != [part_of(f"speaker {number}", [0.8, 0.1], seed=4) for number in range(100)]


def test_conditions_and_lists_of_keys_choose(spoken: Path, tmp_path: Path) -> None:
    for name, choice in split_choices(str(spoken), ["short=seconds < 0.1", "rest=number >= 0"], by="key", seed=0).items():
        reshard([str(spoken)], tmp_path / name, choice=choice, workers=1)
    assert keys(tmp_path / "short") == [f"k{number:03d}" for number in range(5)]
    assert keys(tmp_path / "rest") == [f"k{number:03d}" for number in range(5, 40)]
    (tmp_path / "list.txt").write_text("k007\nk008\n")
    reshard([str(spoken)], tmp_path / "few", choice=filter_choice(str(spoken), "number < 10", tmp_path / "list.txt"), workers=1)
    assert keys(tmp_path / "few") == [f"k{number:03d}" for number in (0, 1, 2, 3, 4, 5, 6, 9)]
    assert whole(tmp_path / "few")


def test_what_cannot_be_done_is_refused_before_anything_is_written(spoken: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'speaker'"):
        filter_choice(str(spoken), "speakr == 's1'", None)
    with pytest.raises(ConfigError, match="add up to at most 1"):
        split_choices(str(spoken), ["a=0.7", "b=0.7"], by="key", seed=0)
    with pytest.raises(DataError, match="no 'room' to split by"):
        reshard([str(spoken)], tmp_path / "x", choice=split_choices(str(spoken), ["a=1"], by="room", seed=0)["a"], workers=1)
    (tmp_path / "list.txt").write_text("k999\n")
    with pytest.raises(DataError, match=r"not in .*, for instance 'k999'"):
        filter_choice(str(spoken), None, tmp_path / "list.txt")
    with pytest.raises(DataError, match="nothing was written"):
        reshard([str(spoken)], tmp_path / "x", choice=Choice(lambda _: False, about="nothing"), workers=1)
    assert not (tmp_path / "x").exists()
    reshard([str(spoken)], tmp_path / "y", workers=1)
    with pytest.raises(DataError, match="another data set"):
        reshard([str(spoken)], tmp_path / "y", samples_per_shard=7, workers=1)
    with pytest.raises(DataError, match="one of the data sets to read"):
        reshard([str(spoken)], spoken, workers=1)


def test_a_damaged_sample_stops_the_copy_and_is_named(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "a", [3])
    tar = source / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(png(1)[-20:], b"\0" * 20))
    with pytest.raises(RunError, match="'000001' is not the one that was written"):
        reshard([str(source)], tmp_path / "b", workers=1)
    assert not list((tmp_path / "b").glob("*.tar"))
