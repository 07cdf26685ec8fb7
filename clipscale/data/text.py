"""Captions: cleaned, and which of several is used."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_UNWANTED = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


def clean_caption(caption: str) -> str:
    """One spelling of each character (NFC), control characters and runs of white space as one space, no space at the ends."""
    if caption.isascii() and caption.isprintable() and "  " not in caption:
        return caption.strip()
    return _UNWANTED.sub(" ", unicodedata.normalize("NFC", caption)).strip()


def choose_caption(captions: Sequence[str], seed: int) -> str:
    """One of a sample's captions, by the sample's seed: another in each epoch."""
    return captions[0] if len(captions) == 1 else captions[(seed & 0xFFFFFFFF) % len(captions)]
