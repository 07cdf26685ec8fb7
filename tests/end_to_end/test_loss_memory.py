"""The loss holds a few tiles beside its gradients: peak memory in fresh processes, beside open_clip's."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "contrast.py"))


def test_peak_memory_is_a_small_part_of_open_clips_and_grows_with_the_batch_not_its_square() -> None:
    peak = BENCHMARK["peak_growth_bytes"]
    ours = min(peak("clipscale", 16384, 512) for _ in range(2))  # what else a process does can only add to its resident memory
    smaller, theirs = peak("clipscale", 4096, 512), peak("open_clip", 16384, 512)
    assert 0 < ours <= 0.04 * theirs
    assert math.log(ours / smaller, 4) <= 1.1
