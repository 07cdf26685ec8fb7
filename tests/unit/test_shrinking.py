"""Shrinking: how near it comes to Pillow's Hamming filter, beside the filter that others use."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data_tools.shrinking import shrink, shrinks


def photograph() -> np.ndarray[Any, Any]:
    """Smooth parts with fine grain."""
    random = np.random.default_rng(3)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + random.normal(0, 12, (480, 640, 1)), 0, 255).astype(np.uint8)


def noise() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)


@pytest.mark.parametrize(("picture", "most"), [(photograph(), 2.3), (noise(), 13.0)], ids=["photograph", "noise"])
def test_every_ratio_is_nearer_to_hamming_than_the_area_filter(picture: np.ndarray[Any, Any], most: float) -> None:
    for ratio in (1.02, 1.14, 1.3, 1.46, 1.52, 1.7, 1.9, 2.3, 2.5, 3.0, 3.5, 4.0):
        size = round(640 / ratio), round(480 / ratio)
        hamming = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.HAMMING)).astype(int)
        area = np.abs(cv2.resize(picture, size, interpolation=cv2.INTER_AREA) - hamming).mean()
        ours = np.abs(shrink(picture, size) - hamming).mean()
        assert ours < min(area, most), ratio  # of 255 levels


def test_flat_pictures_stay_as_they_are_to_the_edges_in_colour_and_in_grey() -> None:
    for shape in ((60, 90, 3), (60, 90)):
        assert np.unique(shrink(np.full(shape, 201, np.uint8), (30, 20))).tolist() == [201]


def test_only_what_shrinks_by_at_most_four_on_both_sides_is_taken() -> None:
    taken = {after: shrinks((400, 300), after) for after in ((100, 75), (300, 300), (99, 75), (400, 301), (400, 300))}
    assert taken == {(100, 75): True, (300, 300): True, (99, 75): False, (400, 301): False, (400, 300): False}
