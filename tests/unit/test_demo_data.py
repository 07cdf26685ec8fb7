"""The demo's raw data: what is spoken and shown, and that nothing of the evaluation was heard or seen in training."""

from __future__ import annotations

import json
import string
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from clipscale.demo.commands import ACTIONS, INTENTS
from clipscale.demo.digits import DIGITS, write_digits
from clipscale.demo.speech import Utterance, record, utterances
from clipscale.errors import MissingPackage

SPLITS = utterances()
EVALUATION = ("test_voices", "test_phrasings", "test_digits")


def voices(split: str) -> set[str]:
    return {utterance.voice for utterance in SPLITS[split]}


def transcripts(split: str) -> set[str]:
    return {utterance.transcript for utterance in SPLITS[split]}


def phrasing(utterance: Utterance) -> str:
    """The sentence without what the intent fills in."""
    assert utterance.intent is not None
    return utterance.transcript.replace(utterance.intent.object, "OBJECT").replace(utterance.intent.location, "LOCATION")


def test_there_are_at_least_24_intents_and_each_is_trained_and_evaluated_in_several_phrasings() -> None:
    assert len({intent.key for intent in INTENTS}) >= 24
    assert len({intent.name for intent in INTENTS}) == len(INTENTS)
    for split, at_least in (("train", 6), ("test_voices", 2), ("test_phrasings", 2)):
        heard = Counter(key for key, _ in {(u.intent.key, u.transcript) for u in SPLITS[split] if u.intent})
        assert set(heard) == {intent.key for intent in INTENTS}
        assert min(heard.values()) >= at_least, split


def test_at_least_40_voices_speak_and_those_of_evaluation_never_speak_in_training() -> None:
    assert len(voices("train") | voices("test_voices")) >= 40
    for split in EVALUATION:
        assert not voices(split) & voices("train")


def test_a_held_out_speaker_is_held_out_in_every_accent() -> None:
    trained = {voice.partition("+")[2] for voice in voices("train")}
    assert not trained & {voice.partition("+")[2] for split in EVALUATION for voice in voices(split)}


def test_held_out_phrasings_share_no_sentence_and_no_frame_with_training() -> None:
    assert not transcripts("test_phrasings") & transcripts("train")
    trained = {phrasing(utterance) for utterance in SPLITS["train"] if utterance.intent}
    assert not {phrasing(utterance) for utterance in SPLITS["test_phrasings"]} & trained


def test_held_out_voices_say_what_training_said() -> None:
    assert transcripts("test_voices") <= transcripts("train")
    assert transcripts("test_digits") <= transcripts("train")


def test_every_phrasing_names_the_object_and_the_location() -> None:
    for action in ACTIONS:
        for sentence in (action.name, *action.phrasings, *action.held_out):
            assert sorted(field for _, field, _, _ in string.Formatter().parse(sentence) if field) == ["location", "object"]


def test_no_two_utterances_share_a_recording() -> None:
    paths = [utterance.path for split in SPLITS.values() for utterance in split]
    assert len(set(paths)) == len(paths)


def test_a_row_says_what_is_asked_by_whom_and_a_digit_has_a_label_and_no_intent() -> None:
    command = next(u for u in SPLITS["test_phrasings"] if u.intent and u.intent.key == "turn_off_music_office").row
    assert command["intent_name"] == "turn off the music in the office"
    assert command["slots"] == {"action": "turn off", "object": "music", "location": "office"}
    assert command["captions"] == [command["transcript"]]
    assert command["speaker"] in voices("test_phrasings")
    assert "label" not in command
    digit = SPLITS["test_digits"][0].row
    assert digit["label"] == "zero"
    assert not {"intent", "intent_name", "slots"} & set(digit)


def speak(folder: Path, spoken: list[Utterance]) -> list[bytes]:
    """Recorded by a process of its own, as espeak-ng must be."""
    with get_context("spawn").Pool(1) as pool:
        pool.apply(record, (folder, spoken))
    return [(folder / utterance.path).read_bytes() for utterance in spoken]


def test_recordings_are_16_khz_mono_flac_and_byte_identical_in_another_process(tmp_path: Path) -> None:
    spoken = [SPLITS["train"][0], SPLITS["test_phrasings"][-1], SPLITS["test_digits"][7]]
    recorded = speak(tmp_path / "once", spoken)
    assert speak(tmp_path / "again", spoken) == recorded
    for utterance in spoken:
        info = soundfile.info(tmp_path / "once" / utterance.path)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        waveform, _ = soundfile.read(tmp_path / "once" / utterance.path)
        assert 0.3 <= info.duration <= 4.0
        assert 0.25 <= np.abs(waveform).max() <= 0.95


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def rows(folder: Path, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_scan_is_in_exactly_one_split_and_every_digit_in_both(written: Path) -> None:
    train, test = rows(written, "train"), rows(written, "test")
    assert len({str(row["image"]) for row in train + test}) == len(train) + len(test) == 1797
    assert {row["label"] for row in train} == {row["label"] for row in test} == set(DIGITS)
    assert 0.2 < len(test) / 1797 < 0.3


def test_a_scan_is_a_32_by_32_picture_with_black_ink_and_several_captions(written: Path) -> None:
    row = rows(written, "train")[0]
    picture = Image.open(written / str(row["image"]))
    assert picture.size == (32, 32)
    grey = np.asarray(picture)
    assert grey[0, 0] > 200  # paper: scans of digits leave their corners blank
    assert grey.min() < 40
    captions = row["captions"]
    assert isinstance(captions, list)
    assert len(set(captions)) >= 4
    assert all(str(row["label"]) in caption for caption in captions)


def test_digits_are_written_byte_for_byte_again(written: Path, tmp_path: Path) -> None:
    write_digits(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "images/0000.png", "images/1796.png"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_missing_scikit_learn_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install scikit-learn"):
        write_digits(tmp_path)
