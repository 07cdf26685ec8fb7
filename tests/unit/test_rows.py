"""Rows: what each kind of input is taken for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clipscale.errors import ConfigError, DataError
from data_tools.media import read_file
from data_tools.rows import Row, open_rows, rows_kind


def write(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options: Any) -> list[Row]:
    return list(open_rows(path, **options).read())


def test_folder_takes_every_line_of_the_text_beside_a_file_as_a_caption(tmp_path: Path) -> None:
    write(tmp_path / "b/2.JPG")
    write(tmp_path / "b/2.txt", "two\n \na pair\n")
    write(tmp_path / "a.wav")
    write(tmp_path / "a.txt", "\ufeffone")
    write(tmp_path / ".hidden.jpg")
    write(tmp_path / ".cache/thumbnail.jpg")
    first, second = read(tmp_path)
    assert (first.name, first.image, first.speech, first.captions) == ("a.wav", None, tmp_path / "a.wav", ("one",))
    assert (second.name, second.image, second.captions) == ("b/2.JPG", tmp_path / "b/2.JPG", ("two", "a pair"))


def test_folder_pairs_an_image_and_a_recording_of_the_same_name(tmp_path: Path) -> None:
    for suffix in ("jpg", "flac"):
        write(tmp_path / f"x.{suffix}")
    write(tmp_path / "x.txt", "both")
    (row,) = read(tmp_path)
    assert (row.image, row.speech) == (tmp_path / "x.jpg", tmp_path / "x.flac")


def test_folder_names_are_no_captions_of_files_that_lie_in_no_folder(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jpg", "")
    with pytest.raises(DataError, match="its files lie in the folder itself"):
        open_rows(tmp_path / "in", captions_from="folders").guesses()


def test_folder_reads_fields_and_captions_from_json_beside_a_file(tmp_path: Path) -> None:
    write(tmp_path / "x.wav")
    write(tmp_path / "x.json", json.dumps({"captions": ["go", "start"], "intent": "begin", "speaker": 7}))
    (row,) = read(tmp_path)
    assert row.captions == ("go", "start")
    assert row.record["intent"] == "begin"
    assert row.record["speaker"] == 7


def test_folder_without_texts_takes_folder_names_as_label_and_caption(tmp_path: Path) -> None:
    write(tmp_path / "golden_retriever/1.png")
    write(tmp_path / "train/tabby-cat/1.png")
    assert [row.captions for row in read(tmp_path, caption_template="a photo of a {label}")] == [
        ("a photo of a golden retriever",),
        ("a photo of a tabby cat",),
    ]
    assert read(tmp_path)[1].record == {"label": "tabby cat"}


def test_folder_reports_files_it_finds_but_cannot_caption_or_decode_as_rows_with_problems(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.heic")
    write(tmp_path / "c.jpg")
    write(tmp_path / "c.txt", b"\xff\xfe\xff")
    a, b, c = read(tmp_path)
    assert not a.problem
    assert b.problem.startswith("no caption: ")
    assert c.problem.startswith("unreadable caption file: ")


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_a_caption_file_is_a_row_with_a_problem_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    os.mkfifo(tmp_path / "a.txt")
    [row] = open_rows(tmp_path).read()
    assert "no plain file" in row.problem
    assert row.captions == ()


def test_folder_rows_are_named_by_their_place_in_it_and_point_at_their_files(tmp_path: Path) -> None:
    for name in ("b.jpg", "b.txt", "deep/er/a.jpg", "deep/er/a.wav", "deep/er/a.txt", "deep/er/c.wav", "deep/er/c.WAV", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = [(row.name, row.image, row.speech) for row in open_rows(tmp_path).read()]
    assert found == [
        ("b.jpg", tmp_path / "b.jpg", None),
        ("deep/er/a.jpg", tmp_path / "deep/er/a.jpg", tmp_path / "deep/er/a.wav"),
        ("deep/er/c.WAV", None, tmp_path / "deep/er/c.WAV"),
        ("deep/er/c.wav", None, tmp_path / "deep/er/c.wav"),
    ]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file that has bytes and says it has none, as Linux keeps in /proc")
def test_a_file_with_more_bytes_than_its_size_says_is_read_whole() -> None:
    assert read_file(Path("/proc/version")) == Path("/proc/version").read_bytes() != b""


@pytest.mark.parametrize(("names", "message"), [((), "it is empty"), (("notes.pdf",), "1 .pdf"), (("flat.jpg",), "no captions found")])
def test_folder_with_nothing_to_pack_is_refused_with_what_it_holds(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path).guesses()


def test_a_template_without_the_label_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cat/1.jpg")
    with pytest.raises(ConfigError, match="does not say where the label goes"):
        open_rows(tmp_path, caption_template="a photo").guesses()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_table_finds_separator_files_captions_and_fields(tmp_path: Path, separator: str) -> None:
    lines = [["id", "path", "sentence", "client_id", "age"], ["1", "x.mp3", '"Hi, you; | all"', "me", "30"]]
    table = write(tmp_path / "t.csv", "\n".join(separator.join(cells) for cells in lines))
    (row,) = read(table)
    assert row == Row("t.csv:2", None, tmp_path / "x.mp3", ("Hi, you; | all",), {"id": "1", "age": "30", "speaker": "me"})


def test_slots_in_a_cell_of_json_become_fields(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "t.tsv", 'path\ttext\tslots\n1.wav\tlights on\t"{""action"": ""on""}"\n'))
    assert row.record == {"slots": {"action": "on"}}


@pytest.mark.parametrize("place", ["set", "set/Images", "clips"])
def test_files_are_found_beside_a_table_or_in_a_folder_near_it(tmp_path: Path, place: str) -> None:
    table = write(tmp_path / "set" / "captions.csv", "file,caption\n1.jpg,one\n2.jpg,two\n")
    write(tmp_path / place / "2.jpg")
    assert f"files: relative to {tmp_path / place}" in open_rows(table).guesses()
    assert [row.image for row in read(table)] == [tmp_path / place / "1.jpg", tmp_path / place / "2.jpg"]


def test_a_table_of_files_that_are_nowhere_says_where_it_looked(tmp_path: Path) -> None:
    table = write(tmp_path / "alone" / "captions.csv", "file,caption\n1.jpg,one\n")
    with pytest.raises(DataError, match=r"for instance .*/1\.jpg; say where they lie with --images-folder"):
        open_rows(table).guesses()


def test_cells_may_have_spaces_before_their_quotes(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "t.csv", 'file, caption\n1.jpg, "a dog, a cat"\n'))
    assert row.captions == ("a dog, a cat",)


def test_table_columns_can_be_named_and_slots_collected(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "wav,what,say,action,object\nrec/1.wav,x,Lights on,activate,lights\n")
    media = tmp_path / "media"
    media.mkdir()
    (row,) = read(table, speech_column="wav", caption_columns=("say",), slot_columns=("action", "object"), media_folder=media)
    assert row.speech == media / "rec/1.wav"
    assert row.captions == ("Lights on",)
    assert row.record == {"what": "x", "slots": {"action": "activate", "object": "lights"}}


def test_lines_that_follow_each_other_with_the_same_file_become_one_sample(tmp_path: Path) -> None:
    table = write(tmp_path / "captions.txt", "image,caption,n\n1.jpg,a dog,0\n1.jpg,a pet,1\n2.jpg,a cat,0\n1.jpg,again,2\n")
    assert [(row.image and row.image.name, row.captions, dict(row.record)) for row in read(table)] == [  # type: ignore[union-attr]
        ("1.jpg", ("a dog", "a pet"), {}),
        ("2.jpg", ("a cat",), {"n": "0"}),
        ("1.jpg", ("again",), {"n": "2"}),
    ]


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ("", {}, DataError, "it is empty"),
        ("file,caption\n", {}, DataError, "holds no rows"),
        ("1.jpg,a dog\n2.jpg,a cat\n", {}, DataError, "its first line holds a file name"),
        ("file,file,caption\n", {}, DataError, "comes twice"),
        ("file,caption\n1.jpg,a dog\n", {"caption_columns": ("captoin",)}, ConfigError, "did you mean 'caption'"),
        ("file,size\n1.jpg,9\n", {}, DataError, "no column looks like captions"),
        ("id,caption\n1,a dog\n", {}, DataError, "no column holds names of image or sound files"),
        (
            "file,caption\n1.jpg,caf\xe9\n".encode("latin1"),
            {},
            DataError,
            "line 2: not text in the file's encoding: byte 0xe9 after '1.jpgcaf'",
        ),
        ("file,caption\n1.jpg,a dog\n", {"media_folder": Path("nowhere")}, DataError, "no such folder"),
    ],
)
def test_a_table_that_cannot_be_packed_says_why(
    tmp_path: Path, content: str | bytes, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_rows(write(tmp_path / "t.csv", content), **options).guesses()


def test_lines_that_cannot_be_rows_are_problems_and_do_not_hide_the_others(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv",
        "file,caption\n1.jpg,a dog\n2.jpg,a cat, a mat\ns3://host/3.jpg,far\n,none\n" + "1.jpg,a dog\n" * 100 + "http://host/4.jpg,far\n",
    )
    good, wide, far, none, *_, unannounced = read(table)
    assert not good.problem
    assert "3 cells" in wide.problem
    assert far.problem == "not a local file: s3://host/3.jpg"
    assert unannounced.problem == "not a local file: http://host/4.jpg", "addresses are fetched where the first rows hold some"
    assert none.image is None


def test_jsonl_reads_lists_of_captions_and_keeps_fields(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "captions": ["one", "two"], "label": 3, "more": {"deep": [1]}, "score": float("nan")},
        {"image": "b.png", "captions": "solo"},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\nnot json\n")
    first, second, broken = read(path)
    assert (first.captions, first.record) == (("one", "two"), {"label": 3, "more": {"deep": [1]}})
    assert second.captions == ("solo",)
    assert broken.problem.startswith("unreadable line: not JSON")


@pytest.mark.parametrize("as_list", [True, False])
def test_json_files_that_hold_rows_are_read_like_jsonl(tmp_path: Path, as_list: bool) -> None:
    rows = [{"audio_filepath": "a.wav", "text": "hello", "duration": 1.5}, {"audio_filepath": "b.wav", "text": "bye", "duration": 2}]
    path = write(tmp_path / "manifest.json", json.dumps(rows, indent=1) if as_list else "\n".join(map(json.dumps, rows)))
    assert rows_kind(path) == "jsonl"
    assert [(row.speech and row.speech.name, row.captions) for row in read(path)] == [("a.wav", ("hello",)), ("b.wav", ("bye",))]  # type: ignore[union-attr]


COCO = {
    "licenses": [{"id": 4, "name": "CC BY"}],
    "images": [{"id": 9, "file_name": "9.jpg", "license": 4}, {"id": 8, "file_name": "8.jpg"}, {"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"image_id": 7, "caption": "seven"},
        {"image_id": 9, "caption": "nine"},
        {"image_id": 9, "caption": "a nine"},
        {"image_id": 1, "caption": "of no image"},
    ],
}


@pytest.mark.parametrize("place", ["annotations/../val2017", "annotations/val2017", "annotations/../images/val2017"])
def test_coco_gathers_captions_by_image_and_finds_the_folder(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "annotations/captions_val2017.json", json.dumps(COCO))
    (tmp_path / place).resolve().mkdir(parents=True)
    nine, seven = read(path)
    assert nine.captions == ("nine", "a nine")
    assert nine.record == {"image_id": 9, "license_name": "CC BY"}
    assert isinstance(nine.image, Path)
    assert nine.image.resolve() == (tmp_path / place).resolve() / "9.jpg"
    assert seven.captions == ("seven",)


def test_coco_says_where_it_looked_for_images(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.json", json.dumps(COCO))
    with pytest.raises(DataError, match=r"no folder of images at .*images.*--images-folder"):
        open_rows(path).guesses()


def test_inputs_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_rows(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not an input that can be read"):
        open_rows(write(tmp_path / "x.bin", b"\0"))
    with pytest.raises(DataError, match="not an input that can be read"):
        open_rows(write(tmp_path / "x.json", '{"a": 1}'))


def test_an_option_of_another_kind_of_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"read as 'folder': image_column: there is no such setting"):
        open_rows(tmp_path, image_column="file")
    with pytest.raises(ConfigError, match=r"there is no 'tabel' in data_tools.rows, did you mean 'table'"):
        open_rows(tmp_path, kind="tabel")
