"""Voices: espeak-ng's English accents, each spoken by several of its speakers.

A held-out speaker is held out in every accent: evaluation hears voices whose timbre training never heard.
"""

from __future__ import annotations

from itertools import product

ACCENTS = ("en-us", "en-us-nyc", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
"""America, New York City, Great Britain, Scotland, Received Pronunciation, Lancaster, West Midlands, Caribbean."""
TRAIN_SPEAKERS = ("f1", "f2", "f3", "f5", "m1", "m2", "m4", "m5", "m7")
HELD_OUT_SPEAKERS = ("f4", "m3", "m6")


def _voices(speakers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{accent}+{speaker}" for speaker, accent in product(speakers, ACCENTS))


TRAIN_VOICES = _voices(TRAIN_SPEAKERS)
HELD_OUT_VOICES = _voices(HELD_OUT_SPEAKERS)
