"""Corpora and tables with media in their cells, laid out as their publishers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from making_data import png, recording, tone

from clipscale.data.shards import Sample, open_dataset
from clipscale.errors import ConfigError, DataError
from data_tools.build import build
from data_tools.packing import Packing
from data_tools.rows import Row, open_rows, rows_kind

IMAGE = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def write(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options: Any) -> list[Row]:
    rows = open_rows(path, **options)
    rows.guesses()
    return list(rows.read())


def packed(path: Path, output: Path, **options: Any) -> list[Sample]:
    build(open_rows(path, **options), output, packing=Packing(samples_per_shard=3), workers=1)
    index = open_dataset(output)
    samples = [sample for shard, number in enumerate(index.samples) for sample in index.read(shard, range(number))]
    assert not [sample for sample in samples if not isinstance(sample, Sample)]
    return [sample for sample in samples if isinstance(sample, Sample)]


def hugging_face_table(rows: list[dict[str, Any]], features: dict[str, Any]) -> pyarrow.Table:
    noted = json.dumps({"info": {"features": features}})
    return pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": noted})


def photos(number: int) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": png(index), "path": f"{index}.png"}, "text": [f"picture {index}", "a colour"], "label": index % 2}
        for index in range(number)
    ]


@pytest.mark.parametrize("group", [2, 100])
def test_parquet_packs_bytes_of_its_cells_with_names_of_classes(tmp_path: Path, group: int) -> None:
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = hugging_face_table(photos(7)[part * 4 : part * 4 + 4], IMAGE)
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"train-0000{part}-of-00002.parquet", row_group_size=group)
    assert rows_kind(tmp_path / "data") == "parquet"
    samples = packed(tmp_path / "data", tmp_path / "out")
    assert [sample.image for sample in samples] == [png(index) for index in range(7)]
    assert [sample.record["label"] for sample in samples] == ["cat", "dog"] * 3 + ["cat"]
    assert samples[2].captions == ["picture 2", "a colour"]
    assert [sample.image for sample in packed(tmp_path / "data" / "train-00000-of-00002.parquet", tmp_path / "one")] == [
        png(i) for i in range(4)
    ]


def test_parquet_of_plain_bytes_is_told_by_its_content_and_other_bytes_are_left_out(tmp_path: Path) -> None:
    rows = [{"wave": recording(tone(0.1)), "embedding": b"\0\1\2", "transcript": "a tone", "when": 3.5}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    guesses = open_rows(tmp_path / "x.parquet").guesses()
    assert "recordings: in the cells of column wave" in guesses
    assert "not read: column embedding, bytes that are neither images nor recordings" in guesses
    sample = packed(tmp_path / "x.parquet", tmp_path / "out")[1]
    assert sample.speech == recording(tone(0.1))
    assert sample.record == {"when": 3.5, "transcript": "a tone", "captions": ["a tone"]}


def test_parquet_that_names_files_is_read_like_a_table(tmp_path: Path) -> None:
    write(tmp_path / "images" / "1.png", png(1))
    rows = [{"image": {"bytes": None, "path": "1.png"}, "caption": "one", "size": 2**60}]
    schema = pyarrow.schema(
        [
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("caption", pyarrow.string()),
            ("size", pyarrow.int64()),
        ]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "x.parquet")
    (row,) = read(tmp_path / "x.parquet")
    assert (row.image, row.captions, row.record) == (tmp_path / "images" / "1.png", ("one",), {"size": 2**60})


def test_parquet_with_empty_cells_and_files_beside_bytes_fails_only_the_empty_ones(tmp_path: Path) -> None:
    write(tmp_path / "beside.png", png(5))
    cells = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "beside.png"}, None]
    rows = [{"picture": cell, "caption": "x"} for cell in cells]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    summary = build(open_rows(tmp_path / "x.parquet"), tmp_path / "out", workers=1, max_bad=0.5)
    assert (summary.samples, summary.failures) == (2, {"no image or recording": 1})
    assert open_dataset(tmp_path / "out").read(0, [1])[0].image == png(5)  # type: ignore[union-attr]


def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(photos(3)), tmp_path / "x.parquet")
    write(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
        open_rows(tmp_path / "x.parquet").guesses()


def save_to_disk(table: pyarrow.Table, folder: Path) -> None:
    """As Hugging Face's datasets does: arrow streams, listed in state.json."""
    folder.mkdir(parents=True)
    files = []
    for number in range(2):
        name = f"data-0000{number}-of-00002.arrow"
        part = table.slice(number * 3, 3)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
        files.append({"filename": name})
    write(folder / "state.json", json.dumps({"_data_files": files, "_split": folder.name}))
    write(folder / "dataset_info.json", "{}")


def test_a_data_set_saved_by_hugging_face_is_packed_by_split(tmp_path: Path) -> None:
    for split, number in (("train", 5), ("test", 4)):
        save_to_disk(hugging_face_table(photos(number), IMAGE), tmp_path / "saved" / split)
    write(tmp_path / "saved" / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"splits train, test; say which with --split"):
        open_rows(tmp_path / "saved").guesses()
    with pytest.raises(ConfigError, match=r"--split tset: .* did you mean 'test'\?"):
        open_rows(tmp_path / "saved", split="tset").guesses()
    samples = packed(tmp_path / "saved", tmp_path / "out", split="train")
    assert [sample.image for sample in samples] == [png(index) for index in range(5)]
    assert samples[1].record["label"] == "dog"
    assert len(read(tmp_path / "saved", split="all")) == 9
    assert len(read(tmp_path / "saved" / "test")) == 4


def test_common_voice_keeps_quotes_speaker_and_language(tmp_path: Path) -> None:
    names = ["client_id", "path", "sentence_id", "sentence", "up_votes", "age", "gender", "locale", "segment"]
    lines = [names, ["ab12", "common_voice_en_1.mp3", "s1", '"Go, he said.', "2", "fifties", "", "en", ""]]
    lines += [["cd34", "common_voice_en_2.mp3", "s2", 'and "stop"', "2", "", "female", "en", ""]]
    table = write(tmp_path / "en" / "validated.tsv", "\n".join("\t".join(cells) for cells in lines) + "\n")
    write(tmp_path / "en" / "clips" / "common_voice_en_1.mp3")
    first, second = read(table)
    assert (first.speech, first.captions) == (tmp_path / "en" / "clips" / "common_voice_en_1.mp3", ('"Go, he said.',))
    assert first.record == {"sentence_id": "s1", "up_votes": "2", "age": "fifties", "speaker": "ab12", "lang": "en"}
    assert second.captions == ('and "stop"',)


def test_fluent_speech_commands_have_intents_of_three_slots(tmp_path: Path) -> None:
    lines = (
        ",path,speakerId,transcription,action,object,location\n0,wavs/speakers/4Xq/9.wav,4Xq,Turn on the lights,activate,lights,kitchen\n"
    )
    table = write(tmp_path / "fsc" / "data" / "train_data.csv", lines)
    recorded = write(tmp_path / "fsc" / "wavs" / "speakers" / "4Xq" / "9.wav")
    (row,) = read(table)
    assert (row.speech and row.speech.resolve()) == recorded.resolve()  # type: ignore[union-attr]
    assert row.captions == ("Turn on the lights",)
    slots = {"action": "activate", "object": "lights", "location": "kitchen"}
    assert row.record == {"speaker": "4Xq", "slots": slots, "intent": "activate_lights_kitchen"}


def test_slurp_has_a_sample_for_each_recording_with_its_entities(tmp_path: Path) -> None:
    sentence = {
        "slurp_id": 13804,
        "sentence": "event reminder mona tuesday",
        "intent": "calendar_set",
        "scenario": "calendar",
        "action": "set",
        "tokens": [{"surface": word, "id": place} for place, word in enumerate(["event", "reminder", "mona", "tuesday"])],
        "entities": [{"span": [0, 1], "type": "event_name"}, {"span": [3], "type": "date"}],
        "recordings": [{"file": "audio-1.flac", "wer": 0.0, "status": "correct"}, {"file": "audio-1-headset.flac", "status": "correct"}],
    }
    manifest = write(tmp_path / "dataset" / "slurp" / "train.jsonl", json.dumps(sentence) + '\n{"slurp_id": 1}\n')
    write(tmp_path / "dataset" / "slurp" / "slurp_real" / "audio-1.flac")
    write(tmp_path / "dataset" / "slurp" / "slurp_real" / "audio-1-headset.flac")
    first, second, broken = read(manifest)
    assert [row.speech.name for row in (first, second)] == ["audio-1.flac", "audio-1-headset.flac"]  # type: ignore[union-attr]
    assert first.record["intent"] == "calendar_set"
    assert first.record["slots"] == {"event_name": "event reminder", "date": "tuesday"}
    assert broken.problem.startswith("unreadable line: not a sentence as SLURP writes them")


def test_librispeech_reads_transcripts_speakers_and_splits(tmp_path: Path) -> None:
    for split, speaker in (("train-clean-100", "19"), ("dev-clean", "84")):
        folder = tmp_path / "LibriSpeech" / split / speaker / "198"
        write(folder / f"{speaker}-198.trans.txt", f"{speaker}-198-0000 NORTHANGER ABBEY\n{speaker}-198-0001 THIS LITTLE WORK\n")
        write(folder / f"{speaker}-198-0000.flac")
    with pytest.raises(DataError, match="splits dev-clean, train-clean-100"):
        open_rows(tmp_path / "LibriSpeech").guesses()
    first, second = read(tmp_path / "LibriSpeech", split="train-clean-100")
    assert first.speech == tmp_path / "LibriSpeech/train-clean-100/19/198/19-198-0000.flac"
    assert first.captions == ("NORTHANGER ABBEY",)
    assert first.record == {"speaker": "19", "chapter": "198", "split": "train-clean-100"}
    assert second.captions == ("THIS LITTLE WORK",)


def test_speech_commands_follow_the_lists_and_leave_the_noise_out(tmp_path: Path) -> None:
    names = ("yes/0a7c2a8d_nohash_0.wav", "yes/0a7c2a8d_nohash_1.wav", "no/b5d1e505_nohash_0.wav", "_background_noise_/pink_noise.wav")
    for name in names:
        write(tmp_path / "sc" / name)
    write(tmp_path / "sc" / "testing_list.txt", "no/b5d1e505_nohash_0.wav\n")
    write(tmp_path / "sc" / "validation_list.txt", "yes/0a7c2a8d_nohash_1.wav\n")
    assert "left out: 1 recordings in _background_noise_, which say no word" in open_rows(tmp_path / "sc", split="all").guesses()
    assert [(row.name, row.record["split"]) for row in read(tmp_path / "sc", split="all")] == [
        (names[2], "test"),
        (names[0], "train"),
        (names[1], "validation"),
    ]
    (row,) = read(tmp_path / "sc", split="train")
    assert (row.captions, row.record) == (("yes",), {"label": "yes", "speaker": "0a7c2a8d", "split": "train"})
    with pytest.raises(DataError, match="splits train, validation, test"):
        open_rows(tmp_path / "sc").guesses()


def test_flickr_files_of_every_form_give_several_captions_an_image(tmp_path: Path) -> None:
    write(tmp_path / "Images" / "10.jpg")
    forms = {
        "Flickr8k.token.txt": '10.jpg#0\tA child .\n10.jpg#1\tA girl, "happy" .\n',
        "captions.txt": 'image,caption\n10.jpg,A child .\n10.jpg,"A girl, ""happy"" ."\n',
        "results.csv": 'image_name| comment_number| comment\n10.jpg| 0| A child .\n10.jpg| 1| A girl, "happy" .\n',
        "flickr_annotations_30k.csv": 'raw,sentids,filename\n"[""A child ."", ""A girl, \\""happy\\"" .""]","[0, 1]",10.jpg\n',
    }
    for name, content in forms.items():
        (row,) = read(write(tmp_path / name, content))
        assert (row.image, row.captions) == (tmp_path / "Images" / "10.jpg", ("A child .", 'A girl, "happy" .')), name


def test_karpathys_file_gives_a_split_with_all_its_sentences(tmp_path: Path) -> None:
    images = [
        {
            "filename": f"{number}.jpg",
            "filepath": "val2014",
            "split": split,
            "sentids": [0],
            "sentences": [{"raw": "one"}, {"raw": "two"}],
            "cocoid": number,
        }
        for number, split in enumerate(("train", "test", "train"))
    ]
    write(tmp_path / "coco" / "val2014" / "1.jpg")
    path = write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    (row,) = read(path, split="test")
    assert (row.image, row.captions) == (tmp_path / "coco" / "val2014" / "1.jpg", ("one", "two"))
    assert row.record == {"split": "test", "cocoid": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_encodings_are_told_by_their_marks_or_by_the_user(tmp_path: Path, encoding: str, name: str) -> None:
    text = "file,caption\n1.jpg,café\n" if name == "t.csv" else '{"file": "1.jpg", "caption": "café"}\n'
    write(tmp_path / "1.jpg")
    path = write(tmp_path / name, text.encode(encoding))
    (row,) = read(path, **({"encoding": "latin-1"} if encoding == "latin-1" else {}))
    assert row.captions == ("café",)


def test_a_line_in_another_encoding_among_good_ones_is_one_failed_row(tmp_path: Path) -> None:
    lines = [
        b"file,caption",
        *(b"%d.jpg,good" % number for number in range(150)),
        "150.jpg,café".encode("latin-1"),
        "151.jpg,café".encode(),
    ]
    write(tmp_path / "0.jpg")
    rows = read(write(tmp_path / "t.csv", b"\n".join(lines)))
    assert [row.problem for row in rows if row.problem] == [
        "unreadable line: not text in the file's encoding: byte 0xe9 after '150.jpgcaf'"
    ]
    assert (len(rows), rows[-1].captions) == (152, ("café",))
    with pytest.raises(ConfigError, match="--encoding utf-9: there is no such encoding"):
        read(tmp_path / "t.csv", encoding="utf-9")
