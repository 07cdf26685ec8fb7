"""The shard format: whole or absent, the same bytes every time, read by offset, and every complaint it can make."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from making_data import png, recording, tone, write_dataset

from clipscale.data.shards import ShardWriter, finished_shard, open_dataset, read_about, read_member, write_index
from clipscale.data.store import Reading
from clipscale.errors import DataError, MissingPackage, ShardError


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def write_one(folder: Path, *, key: str = "a", plan: str = "", **members: object) -> None:
    with ShardWriter(folder, "000000", plan=plan) as writer:
        writer.write(key, **{"captions": ["a caption"], "image": png(1), **members})  # type: ignore[arg-type]
    write_index(folder, [writer.info])


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_dataset(tmp_path / name, [3, 2], speech=True) for name in ("first", "second"))
    assert hashes(first) == hashes(second)
    assert sorted(hashes(first)) == [
        "000000.parquet",
        "000000.tar",
        "000001.parquet",
        "000001.tar",
        "index.parquet",
        "index.sha256",
        "sizes.json",
    ]


def test_tar_is_plain_ustar_with_members_of_a_sample_together(tmp_path: Path) -> None:
    write_one(tmp_path, speech=recording(tone(0.1)), record={"label": 7}, captions=["eine Sieben", "a seven"])
    with tarfile.open(tmp_path / "000000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == ["a.png", "a.flac", "a.txt", "a.json"]
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o444)}
        assert not any(member.pax_headers for member in members)
        texts = [tar.extractfile(name).read() for name in ("a.txt", "a.json")]  # type: ignore[union-attr]
    assert texts[0] == b"eine Sieben"
    assert json.loads(texts[1]) == {"captions": ["eine Sieben", "a seven"], "label": 7}


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    import webdataset

    folder = write_dataset(tmp_path, [3])
    with fsspec.open(folder / "000000.tar") as file:
        samples = list(webdataset.tariterators.tar_file_expander([{"stream": file, "url": "000000.tar"}]))
    grouped = list(webdataset.tariterators.group_by_keys(samples))
    assert [sample["__key__"] for sample in grouped] == ["000000", "000001", "000002"]
    assert [sample["txt"] for sample in grouped] == [b"0", b"1", b"2"]
    assert grouped[2]["png"] == png(2)


def test_samples_read_by_offset_are_the_ones_written(tmp_path: Path) -> None:
    index = open_dataset(write_dataset(tmp_path, [2, 3], speech=True))
    samples = index.read(1, [2, 0])
    assert [sample.key for sample in samples if not isinstance(sample, ShardError)] == ["000004", "000002"]
    sample = samples[0]
    assert not isinstance(sample, ShardError)
    assert sample.image == png(4)
    assert sample.speech == recording(tone(0.054, hertz=204))
    assert sample.captions == ["4", "number 4"]
    assert sample.record["label"] == 4


def test_sidecar_holds_sizes_from_the_headers(tmp_path: Path) -> None:
    write_one(tmp_path, image=png(1, size=12), speech=recording(np.zeros((441, 2)), rate=44_100, kind="WAV"))
    row = pyarrow.parquet.read_table(tmp_path / "000000.parquet").to_pylist()[0]
    assert (row["width"], row["height"], row["frames"], row["sample_rate"]) == (12, 12, 441, 44_100)
    assert (row["image_suffix"], row["speech_suffix"], row["captions"], row["status"]) == ("png", "wav", 1, "ok")


def test_index_counts_and_sizes_json(tmp_path: Path) -> None:
    index = open_dataset(write_dataset(tmp_path, [2, 3], speech=True))
    assert index.samples.tolist() == [2, 3]
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"000000.tar": 2, "000001.tar": 3}
    assert {name: index.totals[name] for name in ("samples", "images", "recordings", "captions")} == {
        "samples": 5,
        "images": 5,
        "recordings": 5,
        "captions": 10,
    }
    assert index.totals["seconds"] == pytest.approx(5 * 0.05 + 0.010, abs=1e-9)


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, "000000") as writer:
            writer.write("a", captions=["a"], image=png(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_finished_shard_knows_its_plan_and_its_bytes(tmp_path: Path) -> None:
    write_one(tmp_path, plan="rows 0 to 1")
    info = finished_shard(tmp_path, "000000", plan="rows 0 to 1")
    assert info is not None
    assert info.samples == 1
    assert finished_shard(tmp_path, "000000", plan="rows 0 to 2") is None
    assert finished_shard(tmp_path, "000001", plan="rows 0 to 1") is None
    damage(tmp_path / "000000.tar", 600)
    assert finished_shard(tmp_path, "000000", plan="rows 0 to 1") is None


def test_about_comes_back(tmp_path: Path) -> None:
    assert read_about(tmp_path) == {}
    write_index(tmp_path, [], about={"input": "photos"})
    assert read_about(tmp_path) == {"input": "photos"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"key": "a.b"}, "key 'a.b': only letters"),
        ({"key": "../a"}, "key '../a': only letters"),
        ({"captions": []}, "sample 'a' has no caption"),
        ({"captions": ["good", " "]}, "sample 'a' has no caption, or an empty one"),
        ({"image": None}, "sample 'a' has neither an image nor speech"),
    ],
)
def test_writer_refuses(tmp_path: Path, members: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_one(tmp_path, **members)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"image": b"GIF89a, as it says"}, "not a jpg, png or webp picture: it has 18 bytes and begins with b'GIF89a"),
        ({"image": b""}, "not a jpg, png or webp picture: it is empty"),
        ({"image": png(1)[:20]}, "damaged png header"),
        ({"speech": b"ID3 an mp3"}, "not a flac or wav recording"),
        ({"speech": recording(tone(0.1))[:10]}, "damaged flac header"),
        ({"speech": recording(np.zeros(0), kind="WAV")}, "the wav recording has no frames"),
    ],
)
def test_writer_refuses_media_that_are_not(tmp_path: Path, members: dict[str, object], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        write_one(tmp_path, **members)  # type: ignore[arg-type]


def test_writer_refuses_a_key_twice_and_a_shard_name_with_a_path(tmp_path: Path) -> None:
    def twice() -> None:
        with ShardWriter(tmp_path, "000000") as writer:
            for _ in range(2):
                writer.write("a", captions=["a"], image=png(1))

    with pytest.raises(DataError, match="key 'a' comes twice in shard 000000"):
        twice()
    with pytest.raises(DataError, match=r"shard name '\.\./x'"):
        ShardWriter(tmp_path, "../x")


def rewrite_index(folder: Path, **columns: object) -> None:
    table = pyarrow.parquet.read_table(folder / "index.parquet")
    for name, value in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pyarrow.array([value] * len(table), table.schema.field(name).type))
    pyarrow.parquet.write_table(table, folder / "index.parquet")


def test_opening_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no index\.parquet; it holds neither an index nor \.tar files.*clipscale-shards build"):
        open_dataset(tmp_path)
    folder = write_dataset(tmp_path / "data", [1, 1])
    (folder / "000001.tar").unlink()
    (folder / "000000.parquet").unlink()
    with pytest.raises(DataError, match=r"2 of the files that index.parquet lists are missing: 000000.parquet, 000001.tar"):
        open_dataset(folder)
    (folder / "index.parquet").unlink()
    with pytest.raises(DataError, match=r"1 \.tar files without an index"):
        open_dataset(folder)


def test_opening_refuses_an_index_that_is_no_index(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [1])
    (folder / "index.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"index\.parquet cannot be read"):
        open_dataset(folder)
    pyarrow.parquet.write_table(pyarrow.table({"shard": ["000000"]}), folder / "index.parquet")
    with pytest.raises(DataError, match=r"of another format \(missing columns: \['captions', 'images'"):
        open_dataset(folder)


def test_opening_refuses_nothing(tmp_path: Path) -> None:
    write_index(tmp_path, [])
    with pytest.raises(DataError, match=r"index\.parquet lists no shards"):
        open_dataset(tmp_path)
    with ShardWriter(tmp_path, "000000") as writer:
        pass
    write_index(tmp_path, [writer.info])
    with pytest.raises(DataError, match="none of its 1 shards holds a usable sample"):
        open_dataset(tmp_path)


def test_opening_refuses_a_shard_of_another_size_or_outside_the_folder(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [1])
    with (folder / "000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"1 shards have another size than indexed: 000000.tar \(10244 bytes, indexed 10240\)"):
        open_dataset(folder)
    rewrite_index(folder, shard="../000000")
    with pytest.raises(DataError, match=r"names shard '\.\./000000', which is no plain file name; refused"):
        open_dataset(folder)


def test_opening_refuses_addresses_that_run_or_need_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pipe: addresses run shell commands"):
        open_dataset(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="Protocol not known: nonsense"):
        open_dataset("nonsense://bucket")
    with pytest.raises(MissingPackage, match="s3fs"):
        open_dataset("s3://bucket/data")


def test_a_flipped_byte_anywhere_in_a_sample_is_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [3])
    spans = pyarrow.parquet.read_table(folder / "000000.parquet").to_pylist()
    for offset in range(spans[1]["offset"], spans[1]["offset"] + spans[1]["bytes"], 37):
        damage(folder / "000000.tar", offset)
        samples = open_dataset(folder).read(0, [0, 1, 2])
        assert [isinstance(sample, ShardError) for sample in samples] == [False, True, False]
        assert "sample '000001' is not the one that was written" in str(samples[1])
        damage(folder / "000000.tar", offset)


def test_a_file_cut_after_opening_costs_only_the_samples_behind_the_cut(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [3])
    index = open_dataset(folder)
    os.truncate(folder / "000000.tar", 4000)
    samples = index.read(0, [0, 2])
    assert not isinstance(samples[0], ShardError)
    assert "the file ends inside sample '000002'" in str(samples[1])


def test_a_file_gone_after_opening_is_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [1])
    index = open_dataset(folder)
    (folder / "000000.tar").unlink()
    assert "000000.tar is gone since the data set was opened" in str(index.read(0, [0])[0])
    (folder / "000000.parquet").unlink()
    with pytest.raises(ShardError, match=r"000000\.parquet is gone"):
        open_dataset_without_checks(folder).read(0, [0])


def open_dataset_without_checks(folder: Path) -> object:
    from clipscale.data.dataset import DatasetIndex

    return DatasetIndex(str(folder), pyarrow.parquet.read_table(folder / "index.parquet"))


def test_a_sidecar_of_other_data_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [2])
    other = write_dataset(tmp_path / "other", [3])
    (folder / "000000.parquet").write_bytes((other / "000000.parquet").read_bytes())
    with pytest.raises(ShardError, match=r"000000.parquet is not the sidecar that index.parquet describes"):
        open_dataset(folder).read(0, [0])


def test_data_in_an_fsspec_store_reads_like_a_folder(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [2, 1])
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/shards/{path.name}", path.read_bytes())
    local, remote = open_dataset(folder), open_dataset("memory://shards")
    assert remote.fingerprint == local.fingerprint
    assert remote.read(0, [1, 0]) == local.read(0, [1, 0])


class FlakyStore(MemoryFileSystem):
    """A store whose next reads go wrong as told."""

    protocol = "flaky"
    cachable = False
    faults: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky:/"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        data: bytes = super().cat_file(path, start, end, **options)
        fault = self.faults.pop(0) if self.faults and path.endswith(".tar") else "none"
        if fault == "silent":
            raise TimeoutError("the store did not answer")
        return {"none": data, "short": data[:-1], "wrong": data[:600] + b"?" + data[601:]}[fault]


@pytest.fixture
def flaky(tmp_path: Path) -> tuple[Path, str]:
    """A data set in a folder, and the address of the same in a store that can fail."""
    folder = write_dataset(tmp_path, [3])
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    for path in folder.iterdir():
        FlakyStore().pipe_file(f"/flaky/{path.name}", path.read_bytes())
    return folder, "flaky://flaky"


@pytest.mark.parametrize("faults", ["silent", "silent silent silent", "short", "wrong", "silent short silent"])
def test_a_store_that_fails_and_then_answers_costs_no_sample(flaky: tuple[Path, str], faults: str) -> None:
    folder, address = flaky
    FlakyStore.faults[:] = faults.split()
    assert open_dataset(address, reading=Reading(pause_s=0)).read(0, [2, 0]) == open_dataset(folder).read(0, [2, 0])
    assert FlakyStore.faults == []


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("silent " * 5, "cannot be read, after 5 tries: the store did not answer"),
        ("short " * 5, "bytes from 0 on were asked for"),
        ("wrong " * 5, "checksum"),
    ],
)
def test_a_store_that_keeps_failing_is_named(flaky: tuple[Path, str], faults: str, message: str) -> None:
    FlakyStore.faults[:] = faults.split()
    (sample,) = open_dataset(flaky[1], reading=Reading(pause_s=0)).read(0, [0])
    assert message in str(sample)


def test_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    one = open_dataset(write_dataset(tmp_path / "one", [2])).fingerprint
    assert one == open_dataset(write_dataset(tmp_path / "same", [2])).fingerprint
    assert one != open_dataset(write_dataset(tmp_path / "more", [3])).fingerprint


def test_read_member_finds_a_sample_by_key(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [2, 2], speech=True)
    assert read_member(folder, "000003", ("jpg", "png", "webp")) == ("png", png(3))
    assert read_member(folder, "000003", ("flac", "wav"))[0] == "flac"
    with pytest.raises(DataError, match="holds no sample with the key '000009'"):
        read_member(folder, "000009", ("png",))
    with pytest.raises(DataError, match="sample '000003' has no member jpg"):
        read_member(folder, "000003", ("jpg",))


@pytest.mark.parametrize(
    ("record", "text", "message"),
    [
        (b"[1]", b"a", "its .json holds a list, not an object"),
        (b"{", b"a", "its .json cannot be read"),
        (None, b"\xff\xfe", "its .txt is not UTF-8"),
        (None, None, "has no usable caption"),
        (b'{"captions": "one text"}', b"a", "has no usable caption"),
        (None, b"x" * (1 << 20) + b"x", "its .txt has 1048577 bytes; at most 1048576 are read"),
    ],
)
def test_a_sample_whose_texts_cannot_be_used_is_named(record: bytes | None, text: bytes | None, message: str) -> None:
    from clipscale.data.shards import parse_sample

    with pytest.raises(ShardError, match=f"sample 'k'.*{message}"):
        parse_sample("k", image=png(1), speech=None, text=text, record=record)


def test_img2dataset_layout_takes_its_caption_from_the_txt() -> None:
    from clipscale.data.shards import parse_sample

    sample = parse_sample("k", image=b"", speech=None, text=b"a dog", record=b'{"url": "https://example.org/dog.jpg"}')
    assert sample.captions == ["a dog"]
    assert sample.record == {"url": "https://example.org/dog.jpg"}


def test_the_format_imports_no_torch() -> None:
    code = "import sys, clipscale.data.shards; assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_costs_little_beyond_the_bytes(tmp_path: Path) -> None:
    """A sample's whole span comes in one read, whatever the number of its members."""
    index = open_dataset(write_dataset(tmp_path, [4], speech=True))
    index.read(0, [0])
    reads: list[int] = []
    original = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return original(descriptor, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", counted)
        index.read(0, [1, 2, 3])
    assert len(reads) == 3
