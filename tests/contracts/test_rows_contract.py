"""What every kind of input keeps to, those added later too."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clipscale.errors import RequestError
from clipscale.settings import find_part, part_names, part_summaries
from data_tools.media import Address, StoredMedium, TarMember
from data_tools.rows import Row, Rows, open_rows, rows_kind

NAMES = part_names(Rows.folder)


def images(folder: Path) -> None:
    folder.mkdir()
    for stem in "ba":
        (folder / f"{stem}.jpg").touch()


def recordings(folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True)
    for stem in "ba":
        (folder / f"{stem}.{suffix}").touch()


def folder(place: Path) -> Path:
    images(place / "in")
    for stem in "ba":
        (place / "in" / f"{stem}.txt").write_text(f"caption of {stem}")
    return place / "in"


def table(place: Path) -> Path:
    images(place / "images")
    (place / "in.csv").write_text("file,caption\nb.jpg,caption of b\na.jpg,caption of a\n")
    return place / "in.csv"


def jsonl(place: Path) -> Path:
    images(place / "images")
    (place / "in.jsonl").write_text('{"file": "b.jpg", "caption": "caption of b"}\n{"file": "a.jpg", "caption": "caption of a"}\n')
    return place / "in.jsonl"


def coco(place: Path) -> Path:
    images(place / "images")
    pictures = [{"id": number, "file_name": f"{stem}.jpg"} for number, stem in enumerate("ba")]
    annotations = [{"image_id": number, "caption": f"caption of {stem}"} for number, stem in enumerate("ba")]
    (place / "in.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    return place / "in.json"


def tars(place: Path) -> Path:
    (place / "tars").mkdir()
    with tarfile.open(place / "tars" / "00000.tar", "w") as tar:
        for stem in "ba":
            for suffix, data in (("jpg", b""), ("txt", f"caption of {stem}".encode())):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return place / "tars"


def parquet(place: Path) -> Path:
    rows = [{"image": {"bytes": f"\x89PNG {stem}".encode("latin-1"), "path": None}, "caption": f"caption of {stem}"} for stem in "ba"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "in.parquet")
    return place / "in.parquet"


def hugging_face(place: Path) -> Path:
    folder = place / "saved"
    folder.mkdir()
    images(folder / "images")
    table = pyarrow.table({"file": ["images/b.jpg", "images/a.jpg"], "caption": ["caption of b", "caption of a"]})
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def common_voice(place: Path) -> Path:
    recordings(place / "clips", "mp3")
    lines = ["client_id\tpath\tsentence\tlocale", "c1\tb.mp3\tcaption of b\ten", "c2\ta.mp3\tcaption of a\ten"]
    (place / "train.tsv").write_text("\n".join(lines) + "\n")
    return place / "train.tsv"


def fluent_speech_commands(place: Path) -> Path:
    recordings(place / "wavs", "wav")
    (place / "data").mkdir()
    lines = [",path,speakerId,transcription,action,object,location"]
    lines += [f"{number},wavs/{stem}.wav,s{number},caption of {stem},on,lights,none" for number, stem in enumerate("ba")]
    (place / "data" / "train_data.csv").write_text("\n".join(lines) + "\n")
    return place / "data" / "train_data.csv"


def slurp(place: Path) -> Path:
    recordings(place / "slurp_real", "flac")
    lines = [
        {"slurp_id": 1, "sentence": f"caption of {stem}", "scenario": "alarm", "action": "set", "recordings": [{"file": f"{stem}.flac"}]}
        for stem in "ba"
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place / "train.jsonl"


def librispeech(place: Path) -> Path:
    recordings(place / "LibriSpeech" / "1" / "2", "flac")
    (place / "LibriSpeech" / "1" / "2" / "1-2.trans.txt").write_text("b caption of b\na caption of a\n")
    return place / "LibriSpeech"


def speech_commands(place: Path) -> Path:
    for stem in "ba":
        (place / "in" / f"caption_of_{stem}").mkdir(parents=True)
        (place / "in" / f"caption_of_{stem}" / f"{stem}.wav").touch()
    (place / "in" / "validation_list.txt").touch()
    (place / "in" / "testing_list.txt").touch()
    return place / "in"


def flickr(place: Path) -> Path:
    images(place / "Images")
    (place / "Flickr8k.token.txt").write_text("b.jpg#0\tcaption of b\na.jpg#0\tcaption of a\n")
    return place / "Flickr8k.token.txt"


def karpathy(place: Path) -> Path:
    images(place / "val2014")
    pictures = [
        {"filename": f"{stem}.jpg", "filepath": "val2014", "split": "val", "sentids": [0], "sentences": [{"raw": f"caption of {stem}"}]}
        for stem in "ba"
    ]
    (place / "dataset_coco.json").write_text(json.dumps({"images": pictures}))
    return place / "dataset_coco.json"


def addresses(place: Path) -> Path:
    (place / "in.txt").write_text("https://a.example/b.jpg\tcaption of b\nhttps://a.example/a.jpg?size=2\tcaption of a\n")
    return place / "in.txt"


EXAMPLES: dict[str, Callable[[Path], Path]] = {
    "addresses": addresses,
    "common_voice": common_voice,
    "coco": coco,
    "flickr": flickr,
    "fluent_speech_commands": fluent_speech_commands,
    "folder": folder,
    "hugging_face": hugging_face,
    "jsonl": jsonl,
    "karpathy": karpathy,
    "librispeech": librispeech,
    "parquet": parquet,
    "slurp": slurp,
    "speech_commands": speech_commands,
    "table": table,
    "tars": tars,
}
OPTIONS = {"speech_commands": {"split": "all"}}


def test_every_kind_of_input_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_recognises_its_own_inputs_and_no_other_of_its_generality_does(name: str, tmp_path: Path) -> None:
    path = EXAMPLES[name](tmp_path)
    kinds = {other: find_part(Rows, other) for other in NAMES}  # type: ignore[type-abstract]
    rivals = [other for other in NAMES if kinds[other].recognises(path) and kinds[other].general <= kinds[name].general]
    assert rivals == [name]
    assert rows_kind(path) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_says_what_it_takes_for_what_and_reads_the_same_twice(name: str, tmp_path: Path) -> None:
    rows = open_rows(EXAMPLES[name](tmp_path), **OPTIONS.get(name, {}))
    assert len(rows.guesses()) >= 2
    first = list(rows.read())
    assert list(rows.read()) == first
    assert sorted((called(row), row.captions) for row in first) == [("a", ("caption of a",)), ("b", ("caption of b",))]


def called(row: Row) -> str:
    """What the row's file is called, without its suffix."""
    medium = row.image or row.speech
    if isinstance(medium, Address):
        return medium.url.rpartition("/")[2].partition(".")[0]
    if isinstance(medium, StoredMedium) and not isinstance(medium, TarMember):
        return medium.read().decode("latin-1")[-1]
    assert isinstance(medium, Path | TarMember)
    return medium.name.partition(".")[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe" * 100], ids=["empty", "noise"])
def test_a_kind_refuses_a_file_of_nonsense_with_a_message(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(RequestError, match=r"input .*/in"):
        open_rows(tmp_path / "in", kind=name).guesses()


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_begins_with_a_line_that_says_what_it_is(name: str) -> None:
    assert part_summaries(Rows.folder)[name].endswith(".")
