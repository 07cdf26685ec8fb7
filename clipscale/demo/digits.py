"""Handwritten digits: the scans that scikit-learn carries, as pictures with captions.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), 1,797 scans of 8×8 grey levels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from clipscale.demo.manifest import Row, fraction, write_manifest
from clipscale.errors import MissingPackage

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CAPTIONS = (
    "{}",
    "the number {}",
    "the digit {}",
    "a handwritten {}",
    "a scan of the digit {}",
    "a picture of the number {}",
    "somebody wrote a {}",
    "this is a {}",
)
"""What is said about a scan; `{}` is the digit's name."""

SIDE = 32
"""Height and width of a picture, pixels."""
TEST_FRACTION = 0.25
"""Of the scans, chosen by their names."""


def write_digits(folder: Path) -> None:
    """Write the scans as `images/*.png`, with `train.jsonl` and `test.jsonl`, into `folder`.

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    grey_levels, digits = _load_scans()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for number, (scan, digit) in enumerate(zip(grey_levels, digits, strict=True)):
        name = f"images/{number:04d}.png"
        _picture(scan).save(folder / name)
        split = "test" if fraction(name) < TEST_FRACTION else "train"
        rows[split].append({"image": name, "captions": [caption.format(DIGITS[digit]) for caption in CAPTIONS], "label": DIGITS[digit]})
    for split, split_rows in rows.items():
        write_manifest(folder / f"{split}.jsonl", split_rows)


def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels 0 to 16 [n, 8, 8], and digits [n]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackage("the demo's digits are scans in the package scikit-learn: pip install scikit-learn") from error
    scans = load_digits()
    return scans.images, scans.target


def _picture(scan: np.ndarray) -> Image.Image:
    """Ink black on white, enlarged."""
    grey = 255 - np.minimum(scan * 16, 255).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
