"""Spoken digits and home commands: many voices, at many speeds and pitches, as FLAC with captions.

Everything follows from the tables in `commands`, `voices` and here, and from hashes of names: nothing is left to chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr

from clipscale.demo.commands import INTENTS, Intent
from clipscale.demo.digits import DIGITS
from clipscale.demo.espeak import SAMPLE_RATE as ESPEAK_SAMPLE_RATE
from clipscale.demo.espeak import Espeak
from clipscale.demo.manifest import Row, fraction, write_manifest
from clipscale.demo.voices import HELD_OUT_VOICES, TRAIN_VOICES

DIGIT_PHRASINGS = ("{}", "the number {}", "number {}", "the digit {}", "this is a {}", "a handwritten {}", "it says {}")
"""How a digit is spoken; `{}` is its name."""

SAMPLE_RATE = 16_000
"""Hertz, of the files written."""
VOICES_PER_SENTENCE = 18
"""Training voices that speak each training sentence."""
TEST_DIGITS_PER_VOICE = 2
"""Phrasings in which each held-out voice speaks each digit."""
SLOWEST, FASTEST = 135, 205
"""Words per minute."""
LOWEST, HIGHEST = 30, 70
"""espeak-ng's pitch, of 0 to 100."""
PROCESSES = 2
"""Fixed: espeak-ng's samples depend on which texts share a process."""


@dataclass(frozen=True)
class Utterance:
    """One sentence in one voice."""

    transcript: str
    voice: str
    name: str
    """Of what is said and how, such as `turn_on_lights_kitchen-3` or `seven-0`."""
    intent: Intent | None = None
    digit: str | None = None

    @property
    def path(self) -> str:
        """Of its recording, relative to the manifest."""
        return f"audio/{self.voice}/{self.name}.flac"

    @property
    def row(self) -> Row:
        """Its line in the manifest."""
        row: Row = {"audio": self.path, "captions": [self.transcript], "transcript": self.transcript, "speaker": self.voice}
        if self.digit:
            row["label"] = self.digit
        if self.intent:
            row |= {"intent": self.intent.key, "intent_name": self.intent.name, "slots": self.intent.slots}
        return row


def write_speech(folder: Path) -> None:
    """Write recordings as `audio/VOICE/*.flac`, with `train`, `test_voices`, `test_phrasings` and `test_digits` `.jsonl`, into `folder`.

    Raises:
        MissingPackage: espeakng-loader is not installed.
    """
    splits = utterances()
    everything = [utterance for split in splits.values() for utterance in split]
    shares = [(folder, everything[process::PROCESSES]) for process in range(PROCESSES)]
    with get_context("spawn").Pool(PROCESSES) as pool:
        pool.starmap(record, shares, chunksize=1)
    for split, spoken in splits.items():
        write_manifest(folder / f"{split}.jsonl", [utterance.row for utterance in spoken])


def utterances() -> dict[str, list[Utterance]]:
    """What is said in each split."""
    return {
        "train": _train(),
        "test_voices": _test_commands(held_out_phrasings=False),
        "test_phrasings": _test_commands(held_out_phrasings=True),
        "test_digits": _test_digits(),
    }


def record(folder: Path, spoken: list[Utterance]) -> None:
    """Speak and write these utterances, in this order; call it in a process of its own."""
    espeak = Espeak()
    for utterance in spoken:
        target = folder / utterance.path
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, _waveform(espeak, utterance), SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def _waveform(espeak: Espeak, utterance: Utterance) -> np.ndarray:
    """16 kHz float samples; speed, pitch and loudness follow from the utterance's path."""
    samples = espeak.say(
        utterance.transcript,
        voice=utterance.voice,
        words_per_minute=round(SLOWEST + (FASTEST - SLOWEST) * fraction(f"speed of {utterance.path}")),
        pitch=round(LOWEST + (HIGHEST - LOWEST) * fraction(f"pitch of {utterance.path}")),
    )
    waveform = soxr.resample(samples.astype(np.float32), ESPEAK_SAMPLE_RATE, SAMPLE_RATE)
    peak = 0.3 + 0.6 * fraction(f"loudness of {utterance.path}")
    return np.asarray(waveform * (peak / max(float(np.abs(waveform).max()), 1.0)))


def _train() -> list[Utterance]:
    spoken = []
    for intent in INTENTS:
        for number, phrasing in enumerate(intent.action.phrasings):
            name = f"{intent.key}-{number}"
            spoken += [Utterance(intent.say(phrasing), voice, name, intent=intent) for voice in _some_train_voices(name)]
    for digit in DIGITS:
        for number, phrasing in enumerate(DIGIT_PHRASINGS):
            name = f"{digit}-{number}"
            spoken += [Utterance(phrasing.format(digit), voice, name, digit=digit) for voice in _some_train_voices(name)]
    return spoken


def _some_train_voices(name: str) -> list[str]:
    """The voices whose hashes with this name are smallest, in the table's order."""
    ranked = sorted(TRAIN_VOICES, key=lambda voice: fraction(f"{voice} says {name}"))[:VOICES_PER_SENTENCE]
    return [voice for voice in TRAIN_VOICES if voice in ranked]


def _test_commands(*, held_out_phrasings: bool) -> list[Utterance]:
    """Every held-out voice speaks every intent once, in a phrasing chosen by name."""
    spoken = []
    for intent in INTENTS:
        seen, held_out = intent.action.phrasings, intent.action.held_out
        for voice in HELD_OUT_VOICES:
            choices = range(len(seen), len(seen) + len(held_out)) if held_out_phrasings else range(len(seen))
            number = choices[int(fraction(f"{voice} asks for {intent.key}") * len(choices))]
            spoken.append(Utterance(intent.say((*seen, *held_out)[number]), voice, f"{intent.key}-{number}", intent=intent))
    return spoken


def _test_digits() -> list[Utterance]:
    """Every held-out voice speaks every digit, in phrasings chosen by name."""
    return [
        Utterance(DIGIT_PHRASINGS[number].format(digit), voice, f"{digit}-{number}", digit=digit)
        for digit in DIGITS
        for voice in HELD_OUT_VOICES
        for number in _some_digit_phrasings(f"{voice} says {digit}")
    ]


def _some_digit_phrasings(name: str) -> list[int]:
    return sorted(range(len(DIGIT_PHRASINGS)), key=lambda number: fraction(f"{name}-{number}"))[:TEST_DIGITS_PER_VOICE]
