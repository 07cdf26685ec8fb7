"""Speech intent on utterances and names whose vectors are set by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from lookup_model import Sample, make_model, write_shards

from clipscale.errors import DataError
from clipscale.evaluators import Evaluation
from clipscale.evaluators.speech_intent import SpeechIntent
from clipscale.parallel.mesh import Mesh

# Axes: on, off, lamp, heater. A name is its action plus its object.
NAMES = {
    "turn on the lamp": [1.0, 0, 1, 0],
    "turn off the lamp": [0.0, 1, 1, 0],
    "turn on the heater": [1.0, 0, 0, 1],
    "turn off the heater": [0.0, 1, 0, 1],
}
UTTERANCES = [
    [1.0, 0, 1, 0],  # 0: plainly lamp_on
    [0.0, 1, 1, 0],  # 1: plainly lamp_off
    [1.0, 0, 0, 1],  # 2: plainly heater_on
    [0.2, 0.1, 1, 0.9],  # 3: the action is clear enough, lamp a little stronger than heater
]
INTENTS = {
    "lamp_on": ("turn on the lamp", {"action": "on", "object": "lamp"}),
    "lamp_off": ("turn off the lamp", {"action": "off", "object": "lamp"}),
    "heater_on": ("turn on the heater", {"action": "on", "object": "heater"}),
    "heater_off": ("turn off the heater", {"action": "off", "object": "heater"}),
}


def _sample(intent: str, utterance: int, speaker: str) -> Sample:
    name, slots = INTENTS[intent]
    return Sample([name], speech=utterance, record={"intent": intent, "intent_name": name, "slots": slots, "speaker": speaker})


SAMPLES = [
    _sample("lamp_on", 0, "anna"),
    _sample("lamp_off", 1, "anna"),
    _sample("heater_on", 2, "ben"),
    _sample("heater_on", 3, "ben"),  # heard as lamp_on: the action is right, the object wrong
    _sample("heater_off", 1, "carla"),  # heard as lamp_off
    _sample("heater_off", 2, "carla"),  # heard as heater_on: the object is right
]


def _evaluate(folder: Path, samples: list[Sample] = SAMPLES, **settings: object) -> Evaluation:
    url = write_shards(folder, samples)
    evaluator = SpeechIntent.model_validate({"source": {"name": "shards", "url": url}, **settings})
    return evaluator.evaluate(make_model(speech=UTTERANCES, texts={**NAMES, "on": [1.0, 0, 0, 0], **SLOT_WORDS}), Mesh.single())


SLOT_WORDS = {"off": [0.0, 1, 0, 0], "lamp": [0.0, 0, 0, 1], "heater": [0.0, 0, 1, 0]}  # the bare objects are mixed up


def test_by_name_counts_what_lies_closest(tmp_path: Path) -> None:
    result = _evaluate(tmp_path)
    figure = result.figure("by_name_accuracy")
    assert (figure.hits, figure.n, figure.value, figure.chance) == (3, 6, 0.5, 0.25)
    assert figure.interval == "cluster bootstrap by speaker"
    assert result.confusion is not None
    assert result.confusion.classes == ["heater_off", "heater_on", "lamp_off", "lamp_on"]
    assert result.confusion.counts == [[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_macro_f1_is_the_mean_over_intents(tmp_path: Path) -> None:
    # heater_off: 0; heater_on: 1 right, 2 said, 2 true: 1/2; lamp_off and lamp_on: 1 right, 2 said, 1 true: 2/3
    assert _evaluate(tmp_path).figure("by_name_macro_f1").value == pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 3) / 4, abs=1e-12)


def test_slots_are_right_together_only_when_each_is(tmp_path: Path) -> None:
    result = _evaluate(tmp_path)
    assert result.figure("by_slots_action_accuracy").hits == 5  # all but the last
    assert result.figure("by_slots_object_accuracy").hits == 4  # 3 and 4 hear a lamp
    assert result.figure("by_slots_accuracy").hits == 3
    assert result.figure("by_slots_accuracy").chance == 0.25


def test_bare_slot_words_can_stand_for_slots(tmp_path: Path) -> None:
    result = _evaluate(tmp_path, slot_templates=["{}"])
    assert result.figure("by_slots_action_accuracy").hits == 5
    assert result.figure("by_slots_object_accuracy").hits == 2  # the words are mixed up, so exactly the others are right


def test_speakers_are_listed_with_their_hits(tmp_path: Path) -> None:
    speakers = {group.name: (group.hits, group.n) for group in _evaluate(tmp_path).groups["speaker"]}
    assert speakers == {"anna": (2, 2), "ben": (1, 2), "carla": (0, 2)}


def test_records_without_slots_leave_slots_out(tmp_path: Path) -> None:
    samples = [Sample(s.captions, speech=s.speech, record={k: v for k, v in s.record.items() if k != "slots"}) for s in SAMPLES]
    assert [figure.name for figure in _evaluate(tmp_path, samples).figures] == ["by_name_accuracy", "by_name_macro_f1"]


def test_an_intent_with_two_names_is_refused(tmp_path: Path) -> None:
    other = Sample(["x"], speech=0, record={**SAMPLES[0].record, "intent_name": "turn off the lamp"})
    with pytest.raises(DataError, match=r"sample 's006': intent 'lamp_on' has intent_name 'turn off the lamp' here"):
        _evaluate(tmp_path, [*SAMPLES, other])


def test_a_record_without_the_intent_is_refused_by_name(tmp_path: Path) -> None:
    bare = Sample(["x"], speech=0, record={"label": 3})
    with pytest.raises(DataError, match=r"sample 's006': record field 'intent' is missing; it has captions, label"):
        _evaluate(tmp_path, [*SAMPLES, bare])


def test_intents_of_the_same_name_are_pointed_out(tmp_path: Path) -> None:
    twin = Sample(["x"], speech=0, record={**SAMPLES[0].record, "intent": "light_on", "intent_name": "Turn on the lamp!"})
    texts = {**NAMES, "Turn on the lamp!": NAMES["turn on the lamp"]}
    url = write_shards(tmp_path, [*SAMPLES, twin])
    evaluator = SpeechIntent.model_validate({"source": {"name": "shards", "url": url}})
    result = evaluator.evaluate(make_model(speech=UTTERANCES, texts=texts), Mesh.single())
    assert result.warnings == ["several intents are called 'turn on the lamp'; nothing can tell them apart"]
