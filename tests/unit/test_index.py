"""Tars used as they are: what the sidecars say is what the tars hold, and nothing is paired that does not belong together."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest
from making_data import encoded, png, recording, tone, write_dataset
from PIL import Image

from clipscale.data.sample import Sample
from clipscale.data.shards import open_dataset
from clipscale.data.sources.shards import Shards
from clipscale.errors import DataError, RunError
from data_tools.index import index
from data_tools.verify import verify

Members = Sequence[tuple[str, bytes]]


def jpeg(number: int) -> bytes:
    return encoded(Image.new("RGB", (16, 12), (number, 0, 255 - number)), "JPEG")


def write_tar(path: Path, members: Members, **options: Any) -> Path:
    """A tar as GNU tar writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def record(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def samples_of(folder: object, **options: Any) -> dict[str, Sample]:
    opened = open_dataset(str(folder), **options)
    read = [sample for shard, size in enumerate(opened.samples) for sample in opened.read(shard, range(size))]
    assert all(isinstance(sample, Sample) for sample in read), read
    return {sample.key: sample for sample in read if isinstance(sample, Sample)}


def left_out(folder: Path) -> dict[str, str]:
    lines = (folder / "failures.jsonl").read_text().splitlines()
    return {failure["row"]: failure["reason"] for failure in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plain(folder: Path, tars: int = 3, size: int = 4) -> Path:
    for tar in range(tars):
        numbers = range(tar * size, (tar + 1) * size)
        write_tar(folder / f"{tar:05d}.tar", [m for n in numbers for m in ((f"{n:04d}.jpg", jpeg(n)), (f"{n:04d}.txt", b"number %d" % n))])
    return folder


def test_layouts_of_others_are_read_as_they_are(tmp_path: Path) -> None:
    sound = recording(tone(0.1, rate=48_000), 48_000)
    write_tar(
        tmp_path / "img2dataset-00000.tar",
        [("000.jpg", jpeg(1)), ("000.json", record(caption="a cat", url="http://x/1.jpg", width=16)), ("000.txt", b"a cat")],
    )
    write_tar(tmp_path / "open.clip.tar", [("a/b/1.PNG", png(2)), ("a/b/1.cls", b"7"), ("a/b/1.txt", b"\xef\xbb\xbftwo")])
    write_tar(tmp_path / "laion=audio.tar", [("é1.flac", sound), ("é1.json", record(text=["a dog barks", "barking"], tag=["dog"]))])
    write_tar(
        tmp_path / "lists.tar", [("./7.webp", encoded(Image.new("RGB", (9, 5)), "WEBP")), ("./7.json", record(captions=["one", "two"]))]
    )
    write_tar(tmp_path / "long.tar", [("n" * 150 + ".jpeg", jpeg(9)), ("n" * 150 + ".txt", b"long")], format=tarfile.PAX_FORMAT)
    summary = index(str(tmp_path), workers=1)
    assert (summary.samples, summary.shards, summary.failures) == (5, 5, {})
    found = samples_of(tmp_path)
    assert {key: sample.captions for key, sample in found.items()} == {
        "000": ["a cat"],
        "a/b/1": ["two"],
        "é1": ["a dog barks", "barking"],
        "./7": ["one", "two"],
        "n" * 150: ["long"],
    }
    assert (found["000"].image, found["000"].record["url"]) == (jpeg(1), "http://x/1.jpg")
    assert (found["é1"].speech, found["é1"].image, found["é1"].record["tag"]) == (sound, None, ["dog"])
    opened = open_dataset(tmp_path)
    assert opened.totals == {"samples": 5, "tar_bytes": summary.bytes, "images": 4, "recordings": 1, "captions": 7, "seconds": 0.1}
    assert (opened.key(*opened.find("é1")), opened.suffix(*opened.find("./7"), "image")) == ("é1", "webp")
    assert not verify(str(tmp_path), found=lambda finding: pytest.fail(finding.line()), workers=1).reasons


def test_what_could_be_paired_wrongly_is_left_out_by_name(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    good = [("good1.jpg", jpeg(1)), ("good1.pyd", pickle.dumps(Bomb())), ("good1.txt", b"one")]
    bad: dict[str, tuple[str, Members]] = {
        "twice": ("duplicate key", [("twice.jpg", jpeg(2)), ("twice.txt", b"a"), ("twice.jpg", jpeg(3)), ("twice.txt", b"b")]),
        "dot.v2": ("key with a dot", [("dot.v2.jpg", jpeg(4)), ("dot.v2.txt", b"v2")]),
        "alone": ("missing partner", [("alone.jpg", jpeg(5))]),
        "text": ("missing partner", [("text.txt", b"text")]),
        "left": ("scattered sample", [("left.jpg", jpeg(6)), ("right.jpg", jpeg(7)), ("left.txt", b"left"), ("right.txt", b"right")]),
        "right": ("scattered sample", []),
        "two": ("several media", [("two.jpg", jpeg(8)), ("two.png", png(8)), ("two.txt", b"two")]),
        "empty": ("empty member", [("empty.jpg", b""), ("empty.txt", b"empty")]),
        "blank": ("unreadable sample", [("blank.jpg", jpeg(9)), ("blank.txt", b" \n")]),
        "gif": ("unreadable sample", [("gif.jpg", b"GIF89a, as it says"), ("gif.txt", b"gif")]),
        "bytes": ("unreadable sample", [("bytes.jpg", jpeg(9)), ("bytes.txt", b"\xff\xfe\xff")]),
        "../up": ("path that leaves the folder", [("../up.jpg", jpeg(10)), ("../up.txt", b"up")]),
        "/root": ("path that leaves the folder", [("/root.jpg", jpeg(11)), ("/root.txt", b"root")]),
        "odd\\udcff": ("unusable name", [("odd\udcff.jpg", jpeg(12)), ("odd\udcff.txt", b"odd")]),
    }
    members = [*good, *(member for _, some in bad.values() for member in some), ("good2.jpg", jpeg(13)), ("good2.txt", b"two")]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(RunError, match=r"14 of 16 samples in .* cannot be used .*more than --max-bad 0.01"):
        index(str(tmp_path), workers=1)
    assert not (tmp_path / "index.parquet").exists()
    summary = index(str(tmp_path), max_bad=0.9, workers=1)
    assert {key: (s.image, s.captions) for key, s in samples_of(tmp_path).items()} == {
        "good1": (jpeg(1), ["one"]),
        "good2": (jpeg(13), ["two"]),
    }
    assert left_out(tmp_path) == {f"a.tar:{key}": reason for key, (reason, _) in bad.items()}
    assert summary.failures["scattered sample"] == 2
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("cut", ["inside", "boundary"])
def test_a_tar_that_was_cut_off_is_refused_or_used_up_to_its_last_sample(cut: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    with tarfile.open(folder / "00001.tar") as tar:
        last = tar.getmembers()[-2]
    os.truncate(folder / "00001.tar", last.offset_data + 50 if cut == "inside" else last.offset)
    with pytest.raises(RunError, match=r"1 of 3 tars in .* are damaged, first 00001\.tar: .* --damaged-tars keep"):
        index(str(folder), max_bad=1, workers=1)
    assert sorted(path.name for path in folder.glob("*.parquet")) == ["00000.parquet", "00002.parquet"]
    index(str(folder), max_bad=1, damaged_tars="keep", workers=1)
    kept = samples_of(folder)
    assert {key: sample.captions for key, sample in kept.items()} == {f"{n:04d}": [f"number {n}"] for n in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)}
    assert left_out(folder) == {"00001.tar:0006": "damaged tar"}  # the last in front of the damage: members of it may be lost


def test_sidecars_elsewhere_leave_the_tars_alone_and_must_be_told_where_they_lie(tmp_path: Path) -> None:
    tars, sidecars = plain(tmp_path / "tars"), tmp_path / "sidecars"
    before = contents(tars)
    index(str(tars), str(sidecars), workers=2)
    assert contents(tars) == before
    with pytest.raises(DataError, match=r"its tars lay at .*/tars .*tars: .*/tars\}"):
        open_dataset(sidecars)
    opened = Shards(url=str(sidecars), tars=str(tars)).open()
    assert opened.fingerprint == open_dataset(str(sidecars), tars=str(tars)).fingerprint
    assert len(samples_of(sidecars, tars=str(tars))) == 12
    (tars / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"missing: 00002\.tar"):
        open_dataset(str(sidecars), tars=str(tars))


def test_tars_in_a_store_are_indexed_into_the_store_or_a_folder_with_the_same_result(tmp_path: Path) -> None:
    folder = plain(tmp_path / "tars")
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/foreign/{path.name}", path.read_bytes())
    index(str(folder), workers=1)
    index("memory://foreign", workers=1)
    index("memory://foreign", str(tmp_path / "beside"), workers=1)
    local, remote = open_dataset(folder), open_dataset("memory://foreign")
    assert local.fingerprint == remote.fingerprint == open_dataset(tmp_path / "beside", tars="memory://foreign").fingerprint
    assert remote.read(1, [0, 3]) == local.read(1, [0, 3])


def test_indexing_again_changes_nothing_and_reads_only_tars_that_changed(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    first, whole = index(str(folder), workers=2), contents(folder)
    assert (first.reused_shards, first.samples) == (0, 12)
    assert (index(str(folder), workers=1).reused_shards, contents(folder)) == (3, whole)
    plain(folder, tars=1)  # written again, the same bytes at another time: read, and found to be what it was
    os.utime(folder / "00000.tar", (1, 1))
    assert index(str(folder), workers=1).reused_shards == 3
    changed = (folder / "00001.tar").read_bytes().replace(b"number 4", b"another!")  # of the same size
    (folder / "00001.tar").write_bytes(changed)
    write_tar(folder / "00003.tar", [("0012.jpg", jpeg(12)), ("0012.txt", b"new")])
    assert index(str(folder), workers=1).reused_shards == 2
    assert samples_of(folder)["0004"].captions == ["another!"]
    (folder / "00002.tar").unlink()
    assert index(str(folder), workers=1).samples == 9
    assert sorted(samples_of(folder)) == [f"{n:04d}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 12)]
    write_tar(folder / "00003.tar", [("0012.jpg", jpeg(12)), ("0012.txt", b"")])
    with pytest.raises(RunError, match="empty member 1"):
        index(str(folder), workers=1)
    with pytest.raises(DataError, match=r"no index\.parquet"):  # the old one knows another sidecar
        open_dataset(folder)
    (folder / "00003.tar").unlink()
    index(str(folder), workers=1)
    assert not list(folder.glob(".*"))


def test_a_lost_index_of_a_data_set_of_ours_comes_back_byte_for_byte(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [3, 2], speech=True)
    before = contents(folder)
    (folder / "index.parquet").unlink()
    (folder / "sizes.json").unlink()
    index(str(folder), workers=1)
    after = contents(folder)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("foreign", ["table", "other"])
def test_files_of_others_that_are_called_as_sidecars_are_stay(foreign: str, tmp_path: Path) -> None:
    """img2dataset writes 00001.parquet beside 00001.tar."""
    folder = plain(tmp_path / "tars")
    theirs = folder / "00001.parquet"
    if foreign == "table":
        pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x/1.jpg"], "key": ["0004"]}), theirs)
    else:
        theirs.write_bytes(b"notes")
    before = contents(folder)
    with pytest.raises(DataError, match=r"1 files of others .* first 00001\.parquet .* index \S+tars --sidecars tars-sidecars"):
        index(str(folder), workers=1)
    assert contents(folder) == before
    index(str(folder), str(tmp_path / "tars-sidecars"), workers=1)
    assert contents(folder) == before
    assert len(open_dataset(tmp_path / "tars-sidecars", tars=str(folder)).shards) == 3


def test_a_killed_index_is_whole_or_not_there_and_goes_on(tmp_path: Path) -> None:
    folder = plain(tmp_path / "tars", tars=12, size=60)
    command = [sys.executable, "-m", "data_tools", "index", str(folder), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("*.parquet"))) < 3 and process.poll() is None:
        pass
    process.kill()
    process.wait()
    assert not (folder / "index.parquet").exists()
    for sidecar in folder.glob("*.parquet"):
        assert pyarrow.parquet.read_table(sidecar, columns=["key"]).num_rows == 60
    assert index(str(folder), workers=2).reused_shards >= 2
    assert len(samples_of(folder)) == 720
    assert contents(folder) == contents(index_of(plain(tmp_path / "calm", tars=12, size=60))) | {
        "indexed.json": contents(folder)["indexed.json"]
    }


def index_of(folder: Path) -> Path:
    index(str(folder), workers=1)
    return folder


def test_what_cannot_be_indexed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for tars, message in {
        f"pipe:touch {ran}": "pipe: addresses run shell commands",
        str(tmp_path / "nowhere"): "there is no such folder",
        str(tmp_path): r"no \.tar lies in the folder itself; it holds deep",
        str(tmp_path / "deep"): r"cannot be used under their names, first 'a b\.tar'",
    }.items():
        write_tar(tmp_path / "deep/a b.tar", [])
        with pytest.raises(DataError, match=message):
            index(tars, workers=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "a b.tar"]
