"""espeak-ng: what it says depends on the texts and their order, not on the clock."""

from __future__ import annotations

import time
from multiprocessing import get_context

import pytest

pytest.importorskip("espeakng_loader")

from clipscale.demo.espeak import Espeak
from clipscale.demo.voices import HELD_OUT_SPEAKERS, TRAIN_SPEAKERS


def say_once_by_every_speaker() -> list[bytes]:
    """One short word by each speaker, in one process."""
    espeak = Espeak()
    return [
        espeak.say("seven", voice=f"en-us+{name}", words_per_minute=170, pitch=50).tobytes() for name in TRAIN_SPEAKERS + HELD_OUT_SPEAKERS
    ]


def in_a_process_of_its_own() -> list[bytes]:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(say_once_by_every_speaker)


def test_every_speaker_says_the_same_samples_in_a_process_started_in_another_second() -> None:
    first = in_a_process_of_its_own()
    time.sleep(1.1)  # espeak-ng seeds the breath noise of f2, f3 and f5 with whole seconds
    second = in_a_process_of_its_own()
    different = [name for name, a, b in zip(TRAIN_SPEAKERS + HELD_OUT_SPEAKERS, first, second, strict=True) if a != b]
    assert not different
