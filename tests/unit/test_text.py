"""Captions: cleaned without harm, chosen by seed."""

from __future__ import annotations

from collections import Counter

import pytest

from clipscale.data.sample import caption_id
from clipscale.data.text import choose_caption, clean_caption


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a red bus", "a red bus"),
        ("  a\tred \n\n bus ", "a red bus"),
        ("a\x00red\x07bus", "a red bus"),
        ("two  spaces", "two spaces"),
        ("caf\u0065\u0301", "café"),
        ("ein Bär, 熊, 🐻", "ein Bär, 熊, 🐻"),
        ("\x00 \n", ""),
        ("", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


def test_captions_are_chosen_evenly_by_seed() -> None:
    chosen = Counter(choose_caption("abc", seed * 0x9E3779B97F4A7C15) for seed in range(3000))
    assert set(chosen) == set("abc")
    assert min(chosen.values()) > 850
    assert choose_caption(["only"], 12345) == "only"


def test_caption_ids_are_the_same_in_every_process() -> None:
    """blake2b of the text, 8 bytes, little-endian, without the lowest bit."""
    assert caption_id("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little") >> 1  # b2sum -l 64 /dev/null
    assert caption_id("a") != caption_id("b")
    assert 0 <= caption_id("a") < 2**63
