"""Shrinking by up to four: Pillow's Hamming filter, nearly, in a fifth of its time."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

MOST = 4.0
"""Largest ratio of sides; JPEGs are decoded at a fraction of their size where it would be larger."""
_HAMMING_SPREAD = 0.118  # variance of Hamming's filter for a ratio of 1: fitted to Pillow's, see tests/unit/test_shrinking.py
_LINEAR_SPREAD = 1 / 6  # of linear interpolation, over all places between two pixels
_SPREADS_FROM = 1.5  # below this ratio interpolation alone is nearer to Hamming than a box filter is

cv2.setNumThreads(1)  # a process a core is at work already
cv2.ipp.setUseIPP(False)  # it rounds as the processor likes, and the nodes of a build must agree


def shrinks(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether `shrink` makes a picture of this width and height out of that one."""
    ratios = [old / new for old, new in zip(before, after, strict=True)]
    return before != after and min(ratios) >= 1 and max(ratios) <= MOST


def shrink(pixels: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The picture in this width and height: spread as far as linear interpolation lacks, then interpolated."""
    across, down = pixels.shape[1] / size[0], pixels.shape[0] / size[1]
    if max(across, down) > _SPREADS_FROM:
        pixels = cv2.sepFilter2D(pixels, -1, _kernel(across), _kernel(down), borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def _kernel(ratio: float) -> np.ndarray[Any, Any]:
    """As many filters of three pixels, none wider than (1, 2, 1), as together have the variance that is missing."""
    spread = max(0.0, _HAMMING_SPREAD * ratio**2 - _LINEAR_SPREAD)
    passes = max(1, math.ceil(2 * spread))
    side, kernel = spread / passes / 2, np.ones(1)
    for _ in range(passes):
        kernel = np.convolve(kernel, [side, 1 - 2 * side, side])
    return kernel.astype(np.float32)
