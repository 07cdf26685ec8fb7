"""Verify: every flipped bit and every missing byte is found, and named by shard, key and reason."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from making_data import png, recording, tone, write_dataset

from clipscale.data.shards import ShardWriter, open_dataset, write_index
from clipscale.errors import DataError
from data_tools.verify import Finding, verify


def findings(folder: Path, *, quick: bool = False) -> list[Finding]:
    found: list[Finding] = []
    result = verify(str(folder), found=found.append, quick=quick, workers=1)
    assert result.reasons.total() == len(found)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("verify") / "set", [3, 2], speech=True)


def test_a_whole_data_set_has_nothing_wrong(whole: Path) -> None:
    result = verify(str(whole), found=lambda finding: pytest.fail(finding.line()), workers=2)
    assert (result.samples, result.shards) == (5, 2)
    assert result.bytes == sum(path.stat().st_size for path in whole.glob("*.tar"))
    assert not findings(whole, quick=True)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_every_flipped_bit_and_every_cut_is_found(whole: Path, tmp_path: Path, how: str) -> None:
    """250 of each, spread over all files by their names, not by their sizes: the small ones too."""
    shutil.copytree(whole, tmp_path / "set")
    generator = random.Random(f"{how} 7")
    files = sorted(path for path in (tmp_path / "set").iterdir())
    assert {path.suffix for path in files} == {".tar", ".parquet", ".json", ".sha256"}
    missed = []
    for _ in range(250):
        path = generator.choice(files)
        data = path.read_bytes()
        place = generator.randrange(len(data))
        bit = 1 << generator.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :] if how == "flip" else data[:place])
        found = findings(tmp_path / "set")
        blamed = {"index.sha256", "index.parquet", "sizes.json"} if path.name == "index.sha256" else {path.name}  # a sum has two ends
        if not blamed & {finding.file for finding in found}:
            missed.append((path.name, place, bit, found))
        path.write_bytes(data)
    assert not missed
    assert not findings(tmp_path / "set")


def test_a_flip_in_a_sample_is_named_by_its_key(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "set")
    columns = open_dataset(whole).sidecar(1).columns
    tar = tmp_path / "set" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(columns["image_offset"][1]) + 20] ^= 4
    tar.write_bytes(data)
    assert [(finding.file, finding.key, finding.reason) for finding in findings(tmp_path / "set")] == [
        ("000001.tar", "", "changed file"),
        ("000001.tar", "000004", "changed bytes"),
    ]


def test_samples_behind_a_cut_are_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "set")
    tar = tmp_path / "set" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[: int(open_dataset(whole).sidecar(0).columns["offset"][1]) + 600])
    cut = [(finding.key, finding.reason) for finding in findings(tmp_path / "set")]
    assert cut == [("", "wrong size"), ("000001", "cut off"), ("000002", "cut off")]
    assert [finding.reason for finding in findings(tmp_path / "set", quick=True)] == ["wrong size"]


def test_media_that_were_damaged_before_they_were_packed_are_found_by_decoding(tmp_path: Path) -> None:
    picture, sound = bytearray(png(3, size=64)), bytearray(recording(np.random.default_rng(1).normal(0, 0.1, 16_000)))
    picture[-30] ^= 255
    sound[len(sound) // 2] ^= 255
    with ShardWriter(tmp_path, "000000") as writer:
        writer.write("good", captions=["a"], image=png(1), speech=recording(tone(0.1)))
        writer.write("bad-image", captions=["a"], image=bytes(picture))
        writer.write("bad-sound", captions=["a"], speech=bytes(sound))
    write_index(tmp_path, [writer.info])
    found = {finding.key: finding.reason for finding in findings(tmp_path)}
    assert found == {"bad-image": "unreadable image", "bad-sound": "unreadable recording"}


def test_missing_and_unlisted_files_are_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "set")
    (tmp_path / "set" / "000001.tar").rename(tmp_path / "set" / "000009.tar")
    (tmp_path / "set" / "sizes.json").unlink()
    assert {(finding.file, finding.reason) for finding in findings(tmp_path / "set")} == {
        ("000001.tar", "missing file"),
        ("000009.tar", "not listed"),
        ("sizes.json", "missing file"),
    }


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither an index nor"):
        findings(tmp_path)
