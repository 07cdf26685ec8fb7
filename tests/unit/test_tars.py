"""Tars of others: every sample comes out as it went in, or is named with the reason; webdataset's known traps among them."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from making_data import png, recording, tone, write_dataset

from clipscale.data.foreign_tars import Contents, ForeignSample, Header, expand_braces, read_contents, read_foreign_tar
from clipscale.data.shards import Sample, open_dataset
from clipscale.errors import ConfigError, DataError
from data_tools.build import build
from data_tools.media import TarMember
from data_tools.packing import Packing
from data_tools.rows import Row, open_rows, rows_kind

Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **options: Any) -> Path:
    """A tar as GNU tar writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pairs(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """An image and a text a sample."""
    return [member for n in numbers for member in ((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", f"number {n}".encode()))]


def read(path: Path, **options: Any) -> list[Row]:
    return list(open_rows(path, **options).read())


def content(medium: object) -> bytes:
    """What lies in the tar where the row says."""
    assert isinstance(medium, TarMember)
    data = medium.tar.read_bytes()[medium.offset : medium.offset + medium.size]
    assert zlib.crc32(data) == medium.crc32
    return data


def problems(path: Path, **options: Any) -> list[tuple[str, str]]:
    """Rows that failed: their names and reasons."""
    return [(row.name, row.problem.partition(": ")[0]) for row in read(path, **options) if row.problem]


def samples(path: Path) -> list[ForeignSample]:
    return list(read_foreign_tar(path, read_contents(path), media={"png"}, texts={"txt"}))


def test_tars_written_by_webdataset_come_out_as_they_went_in(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in range(5):
            writer.write({"__key__": f"part/{number:04d}", "png": png(number), "txt": f"number {number}".encode()})
    rows = read(tmp_path / "a.tar")
    assert [(row.name, row.captions) for row in rows] == [(f"a.tar:part/{n:04d}", (f"number {n}",)) for n in range(5)]
    assert [content(row.image) for row in rows] == [png(n) for n in range(5)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_tar_format(kind: int, tmp_path: Path) -> None:
    name = "a" * 90 + "/" + "b" * 90
    (row,) = read(write_tar(tmp_path / "a.tar", [(f"{name}.png", png(1)), (f"{name}.txt", b"one")], format=kind))
    assert (row.name, content(row.image)) == (f"a.tar:{name}", png(1))


def test_img2dataset_layout_keeps_the_fields_of_the_json(tmp_path: Path) -> None:
    fields = {"caption": "a cat", "url": "http://x/1.jpg", "status": "success", "width": 8}
    write_tar(tmp_path / "00000.tar", [("000.jpg", png(1)), ("000.json", json.dumps(fields).encode()), ("000.txt", b"a cat")])
    (row,) = read(tmp_path)
    assert (row.captions, row.record, row.problem) == (("a cat",), fields, "")


def test_clap_layout_takes_the_texts_of_the_json(tmp_path: Path) -> None:
    fields = {"text": ["a dog barks", "barking"], "tag": ["dog"], "original_data": {"id": 7}}
    sound = recording(tone(0.1, rate=48_000), 48_000)
    write_tar(tmp_path / "0.tar", [("1.flac", sound), ("1.json", json.dumps(fields).encode())])
    (row,) = read(tmp_path)
    assert (content(row.speech), row.image, row.captions, row.record) == (sound, None, ("a dog barks", "barking"), fields)


@pytest.mark.parametrize(
    ("text", "record", "captions"),
    [
        (b"\xef\xbb\xbfone", None, ("one",)),
        (b"one\ntwo", None, ("one\ntwo",)),
        (b"one", {"caption": "other"}, ("one",)),
        (b"one", {"captions": ["one", "two"]}, ("one", "two")),
        (b" ", {"caption": "one"}, ("one",)),
        (None, {"captions": [], "caption": None, "text": "one"}, ("one",)),
        (None, {"transcript": "one"}, ("one",)),
        (None, {"captions": ["one", 2, ""]}, ("one",)),
    ],
)
def test_captions_are_the_text_and_the_captions_of_the_json_else_its_single_one(
    text: bytes | None, record: dict[str, Any] | None, captions: tuple[str, ...], tmp_path: Path
) -> None:
    members = [("1.png", png(1)), ("1.txt", text), ("1.json", record and json.dumps(record).encode())]
    (row,) = read(write_tar(tmp_path / "a.tar", [(name, data) for name, data in members if data is not None]))
    assert row.captions == captions


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "a.tar", [("./1.png", b""), ("./1.json", b'{"caption": "one", "score": NaN}')]))
    assert (row.name, row.record) == ("a.tar:1", {"caption": "one", "score": None})


def test_suffixes_in_capitals_and_jpeg_are_images(tmp_path: Path) -> None:
    rows = read(write_tar(tmp_path / "a.tar", [("1.JPG", b"1"), ("1.TXT", b"one"), ("2.jpeg", b"2"), ("2.txt", b"two")]))
    assert [(content(row.image), row.captions) for row in rows] == [(b"1", ("one",)), (b"2", ("two",))]


def test_a_sample_of_an_image_and_a_recording_is_one_row_and_one_of_two_images_two(tmp_path: Path) -> None:
    both = [("1.png", png(1)), ("1.flac", b"sound"), ("1.txt", b"one")]
    two, one, other = read(write_tar(tmp_path / "a.tar", [*both, ("2.png", png(2)), ("2.jpg", b"jpg"), ("2.txt", b"two")]))
    assert (content(two.image), content(two.speech)) == (png(1), b"sound")
    assert [(row.name, content(row.image), row.captions) for row in (one, other)] == [
        ("a.tar:2.jpg", b"jpg", ("two",)),
        ("a.tar:2.png", png(2), ("two",)),
    ]


def test_pickled_and_unknown_members_are_neither_decoded_nor_reported_as_samples(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    bomb = pickle.dumps(Bomb())
    members = [("1.png", png(1)), *((f"1.{name}", bomb) for name in ("pyd", "pickle", "pth", "npy", "cls")), ("1.txt", b"one")]
    rows = open_rows(write_tar(tmp_path / "a.tar", [*members, ("2.pyd", bomb), ("README", b"")]))
    assert any("not read" in line and ".pyd" in line for line in rows.guesses())
    (row,) = rows.read()
    assert (row.captions, row.problem) == (("one",), "")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("hidden", ["d/._1.png", "d/.DS_Store", "d/", "./._x.txt"])
def test_hidden_files_between_the_members_of_a_sample_do_not_part_it(hidden: str, tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "a.tar", [("d/1.png", png(1)), (hidden, b""), ("d/1.txt", b"one")]))
    assert (row.name, row.captions, row.problem) == ("a.tar:d/1", ("one",), "")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.txt", b"one")], "no image or recording"),
        ([("1.png", b"")], "no caption"),
        ([("1.png", b""), ("1.txt", b"\xff")], "unreadable caption file"),
        ([("1.png", b""), ("1.json", b"{")], "unreadable caption file"),
        ([("1.png", b""), ("1.json", b"[" * 100_000)], "unreadable caption file"),
        ([("1.png", b""), ("1.json", b"[]")], "unreadable caption file"),
    ],
)
def test_a_sample_that_lacks_something_is_a_row_with_a_problem(members: Members, reason: str, tmp_path: Path) -> None:
    assert problems(write_tar(tmp_path / "a.tar", members)) == [("a.tar:1", reason)]


# webdataset's traps


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def boundaries(path: Path) -> dict[str, int]:
    """Where the header of each member begins."""
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar}


@pytest.mark.parametrize("member", ["0003.png", "0003.txt"])
@pytest.mark.parametrize("into", [0, 300, 520])
def test_a_tar_cut_off_anywhere_is_refused_with_its_name(member: str, into: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(range(6)))
    path = write_tar(tmp_path / "1.tar", pairs(range(6)))
    cut(path, boundaries(path)[member] + into)
    rows = open_rows(tmp_path)
    for act in (rows.guesses, lambda: list(rows.read())):
        with pytest.raises(DataError, match=r"1\.tar: it .*(cut off|cannot be read).*--damaged-tars keep"):
            act()


@pytest.mark.parametrize(("member", "whole"), [("0003.png", 2), ("0003.txt", 3)])
@pytest.mark.parametrize("into", [0, 300, 520])
def test_what_is_kept_of_a_cut_off_tar_are_whole_samples_and_the_loss_is_named(member: str, into: int, whole: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", pairs(range(6)))
    cut(path, boundaries(path)[member] + into)
    rows = read(path, damaged_tars="keep")
    assert [row.captions for row in rows[:-1]] == [(f"number {n}",) for n in range(whole)]
    assert [content(row.image) for row in rows[:-1]] == [png(n) for n in range(whole)]
    assert rows[-1].name == f"1.tar:{whole:04d}"
    assert rows[-1].problem.startswith("damaged tar: it ")


def test_no_two_tars_make_one_sample_of_the_end_of_one_and_the_beginning_of_the_next(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "0.tar", [("7.png", png(1)), ("7.txt", b"one")])
    cut(first, boundaries(first)["7.txt"])
    write_tar(tmp_path / "1.tar", [("7.txt", b"two"), ("7.png", png(2))])
    lost, row = read(tmp_path, damaged_tars="keep")
    assert (lost.name, lost.problem.partition(":")[0]) == ("0.tar:7", "damaged tar")
    assert (row.name, content(row.image), row.captions) == ("1.tar:7", png(2), ("two",))


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(6)))
    data = bytearray(path.read_bytes())
    data[boundaries(path)["0003.png"] + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"header at byte [0-9,]+ is damaged"):
        read(path)
    assert len(read(path, damaged_tars="keep")) == 3


def test_a_member_of_negative_size_ends_the_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([1, 2]))
    header, size = boundaries(path)["0002.png"], (1 << 96) - 4_096  # as tar writes -4,096: base 256
    data = bytearray(path.read_bytes())
    data[header + 124 : header + 136] = size.to_bytes(12, "big")
    block = bytes(data[header : header + 148]) + b" " * 8 + bytes(data[header + 156 : header + 512])
    data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        read(path)


def test_tars_one_after_the_other_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="several tars in one file"):
        read(path)


def test_how_many_tars_are_cut_off_is_said_before_any_is_read(tmp_path: Path) -> None:
    for number in range(5):
        path = write_tar(tmp_path / f"{number}.tar", pairs(range(3)))
        if number > 1:
            cut(path, 1_200)
    with pytest.raises(DataError, match=r"2\.tar: .*\(3 of 5 tars end like it\)"):
        open_rows(tmp_path).guesses()


def test_the_damage_of_a_tar_without_a_whole_sample_is_named_after_the_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    write_tar(tmp_path / "1.tar", pairs([1]))
    rows = open_rows(tmp_path, damaged_tars="keep")
    assert rows.guesses()
    assert [(row.name, bool(row.problem)) for row in rows.read()] == [("0.tar", True), ("1.tar:0001", False)]


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        open_rows(path).guesses()


def test_interleaved_members_are_one_failure_a_sample(tmp_path: Path) -> None:
    apart = [("1.png", b""), ("2.png", b""), ("1.txt", b"one"), ("2.txt", b"two"), ("3.png", b""), ("3.txt", b"three")]
    path = write_tar(tmp_path / "a.tar", apart)
    assert problems(path) == [("a.tar:1", "scattered sample"), ("a.tar:2", "scattered sample")]
    assert [row.captions for row in read(path) if not row.problem] == [("three",)]


@pytest.mark.parametrize("between", [[], pairs([5])])
def test_every_sample_of_a_key_that_comes_twice_fails(between: Members, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs([1]), *between, *pairs([1]), *pairs([2])])
    assert problems(path) == [("a.tar:0001", "duplicate key")] * 2
    assert read(path)[-1].captions == ("number 2",)


def test_a_key_in_two_tars_is_two_samples(tmp_path: Path) -> None:
    for name in ("a/0.tar", "b/0.tar"):
        write_tar(tmp_path / name, pairs([1]))
    assert [row.name for row in read(tmp_path)] == ["a/0.tar:0001", "b/0.tar:0001"]


def test_dots_in_keys_are_a_failure_a_sample(tmp_path: Path) -> None:
    members = [(f"v1.0/img.v2.{n}.{suffix}", b"x") for n in (1, 2) for suffix in ("png", "txt")]
    assert problems(write_tar(tmp_path / "a.tar", [*members, *pairs([3])])) == [
        ("a.tar:v1.0/img.v2.1", "key with a dot"),
        ("a.tar:v1.0/img.v2.2", "key with a dot"),
    ]


def test_pictures_with_dots_and_without_texts_are_failures_too(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.1.png", b""), ("a.2.png", b"")])
    assert problems(path) == [("a.tar:a.1", "key with a dot"), ("a.tar:a.2", "key with a dot")]


def test_a_member_too_large_to_hold_is_a_failure_and_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([2]))
    contents = read_contents(path)
    large = Contents([Header("1.png", "1", "png", 512, (1 << 30) + 1, plain=True), *contents.headers], "")
    first, second = read_foreign_tar(path, large, media={"png"}, texts={"txt"})
    assert first.problem.startswith("unreadable file: 1.png has 1,073,741,825 bytes")
    assert not second.problem


def test_a_second_dotted_sample_beside_a_plain_one_fails_and_an_extra_picture_does_not(tmp_path: Path) -> None:
    extra = [("1.png", png(1)), ("1.thumb.png", png(2)), ("1.txt", b"one")]
    second = [("a.png", png(1)), ("a.2.png", png(2)), ("a.2.txt", b"two"), ("a.txt", b"one")]
    path = write_tar(tmp_path / "a.tar", [*extra, *second])
    assert problems(path) == [("a.tar:a.2", "key with a dot")]
    assert [content(row.image) for row in read(path) if not row.problem] == [png(1), png(1)]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_failures_and_are_not_followed(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, str(tmp_path / "secret")
        tar.addfile(link)
        text = tarfile.TarInfo("1.txt")
        text.size = 3
        tar.addfile(text, io.BytesIO(b"one"))
    assert problems(path) == [("a.tar:1", "link in a tar")]


def test_what_webdataset_leaves_out_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs([1]), ("__own__/2.png", png(2)), ("__own__/2.txt", b"two"), *pairs([3])])
    assert problems(path) == [("a.tar:__own__/2", "lost by webdataset")]
    assert [row.captions for row in read(path) if not row.problem] == [("number 1",), ("number 3",)]


def test_samples_that_webdataset_gives_otherwise_than_the_headers_say_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([1, 2]))
    contents = read_contents(path)
    path.write_bytes(write_tar(tmp_path / "b.tar", [("0001.png", png(1) + b"!"), ("0001.txt", b"number 1"), *pairs([2])]).read_bytes())
    first, second = read_foreign_tar(path, contents, media={"png"}, texts={"txt"})
    assert first.problem.startswith("lost by webdataset: it gives")
    assert not second.problem


def test_a_tar_without_members_has_no_samples(tmp_path: Path) -> None:
    assert samples(write_tar(tmp_path / "a.tar", [])) == []


# which tars


def test_braces_and_globs_name_tars_and_one_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", pairs([number]))
    names = ["00000.tar:0000", "00001.tar:0001", "00002.tar:0002"]
    assert expand_braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]
    assert [row.name for row in read(tmp_path / "{00000..00002}.tar")] == names
    assert [row.name for row in read(tmp_path / "*.tar")] == names
    assert [row.name for row in read(tmp_path / "0000[12].tar")] == names[1:]
    assert [row.name for row in read(tmp_path / "{00002,00000,*}.tar")] == [names[2], names[0], names[1]]
    for pattern, message in {
        "{00000..00004}.tar": r"2 of 5 tars are not there: .*00003\.tar",
        "1*.tar": "no file is called",
        "{00000.tar": "braces are not balanced",
        "{0..99999999}.tar": "stand for 1,000,000 files",
    }.items():
        with pytest.raises(DataError, match=message):
            open_rows(tmp_path / pattern).guesses()


@pytest.mark.parametrize("address", ["pipe:touch gone; cat a.tar", "s3://bucket/{00..09}.tar", "https://x.org/a.tar", "file:/x/a.tar"])
def test_addresses_are_refused_and_run_nothing(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", pairs([1]))
    rows = open_rows(Path(address))
    for act in (rows.guesses, lambda: list(rows.read())):
        with pytest.raises(DataError, match="only tars on a disk of this machine are read"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_folder_of_tars_is_not_a_folder_of_images_and_the_other_way_round(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/deep/0.tar", pairs([1]))
    (tmp_path / "tars/0_stats.json").write_text("{}")
    write_tar(tmp_path / "photos/backup.tar", pairs([1]))
    (tmp_path / "photos/1.jpg").touch()
    assert (rows_kind(tmp_path / "tars"), rows_kind(tmp_path / "photos")) == ("tars", "folder")


def test_tars_without_images_or_recordings_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.npy", b""), ("2.npy", b""), ("2.txt", b"")])
    with pytest.raises(DataError, match=r"no image and no recording in a\.tar .*it has 2 \.npy, 1 \.txt"):
        open_rows(tmp_path).guesses()


def test_an_option_of_other_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="caption_template"):
        open_rows(write_tar(tmp_path / "a.tar", pairs([1])), caption_template="{label}")


# building


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_packs_the_bytes_of_every_sample_for_any_number_of_processes(workers: int, tmp_path: Path) -> None:
    for tar in range(3):
        write_tar(tmp_path / "in" / f"{tar}.tar", pairs(range(tar * 3, tar * 3 + 3)))
    summary = build(open_rows(tmp_path / "in"), tmp_path / "out", packing=Packing(samples_per_shard=4), workers=workers)
    assert (summary.samples, summary.shards, summary.failures) == (9, 3, {})
    index = open_dataset(tmp_path / "out")
    packed = [sample for shard, size in enumerate((4, 4, 1)) for sample in index.read(shard, range(size))]
    assert [(sample.image, sample.captions) for sample in packed if isinstance(sample, Sample)] == [
        (png(n), [f"number {n}"]) for n in range(9)
    ]


def test_a_tar_that_changes_while_it_is_packed_gives_no_wrong_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(10)))
    rows = read(path)
    write_tar(path, [*pairs(range(9)), ("0009.png", png(250)), ("0009.txt", b"another")])
    summary = build(rows, tmp_path / "out", workers=1, max_bad=0.1)
    assert (summary.samples, summary.failures) == (9, {"changed file": 1})


def test_the_same_tars_elsewhere_are_the_same_data_set_and_other_bytes_another(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", pairs(range(4)))
    write_tar(tmp_path / "elsewhere/a.tar", pairs(range(4)))
    build(open_rows(tmp_path / "in"), tmp_path / "out", workers=1)
    assert build(open_rows(tmp_path / "elsewhere"), tmp_path / "out", workers=1).samples == 4
    write_tar(tmp_path / "in/a.tar", [*pairs(range(3)), ("0003.png", png(9)), ("0003.txt", b"number 3")])
    with pytest.raises(DataError, match="holds another data set"):
        build(open_rows(tmp_path / "in"), tmp_path / "out", workers=1)


def test_a_tar_written_again_since_is_packed_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(range(4)))
    reused = []
    for changed in (1, 1, 2):
        os.utime(path, (changed, changed))
        reused.append(build(open_rows(path), tmp_path / "out", workers=1).reused_shards)
    assert reused == [0, 1, 0]


def test_a_disk_without_room_for_the_images_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DataError, match="the disk has room for"):
        build(open_rows(write_tar(tmp_path / "a.tar", pairs(range(4)))), tmp_path / "out", workers=1)


def test_a_data_set_of_ours_can_be_built_again_from_its_tars(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "first", [3, 2], speech=True)
    build(open_rows(first), tmp_path / "second", packing=Packing(samples_per_shard=3), workers=1)
    one, two = (open_dataset(folder) for folder in (first, tmp_path / "second"))
    for shard, size in enumerate((3, 2)):
        for old, new in zip(one.read(shard, range(size)), two.read(shard, range(size)), strict=True):
            assert isinstance(old, Sample)
            assert isinstance(new, Sample)
            assert (new.image, new.speech, new.captions, new.record) == (old.image, old.speech, old.captions, old.record)
