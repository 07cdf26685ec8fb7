"""Goodput: the share of a long run's time that is training, when GPUs fail now and then.

A run with M hours between interruptions that stops C hours for each checkpoint saves best every √(2·C·M) hours (Young 1974,
doi:10.1145/361147.361115; Daly 2006, doi:10.1016/j.future.2004.11.016). An interruption costs what was done since the last checkpoint, half
an interval, and the time to notice and start again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_HOURS = {"Llama 3": 50_677, "OPT": 14_814}
"""GPU-hours to each unexpected interruption, as published: Llama 3 405B, 419 in 54 days on 16,384 H100 (Dubey et al. 2024,
arXiv:2407.21783, section 3.3.4); OPT-175B, about 90 restarts on 992 A100 (Zhang et al. 2022, arXiv:2205.01068, and its logbook)."""
RESTART_S = 600.0
"""From an interruption to the next step: noticed, started again, checkpoint read; an assumption."""
COPY_BYTES_S = 5e9
"""What rank 0 gathers and copies of a checkpoint in a second; training waits for it, and goes on while a thread writes. An assumption:
a CPU alone copies 16 GB/s (benchmarks/checkpoint.py), where nothing is gathered."""
LEAST_STALL_S = 0.1
"""Seconds that the smallest checkpoint stops training, for ranks that agree; an assumption."""


@dataclass(frozen=True)
class Goodput:
    """At one published rate of failures."""

    rate: str
    hours_between: float
    """Between interruptions."""
    best_interval_s: float
    """Seconds of training between checkpoints."""
    share: float
    """Of time that is training, with the best interval."""
    share_as_set: float
    """The same with the run's own interval."""


def goodput(rate: str, *, gpus: int, save_s: float, interval_s: float) -> Goodput:
    """
    Args:
        save_s: how long a checkpoint stops training.
        interval_s: seconds of training between the run's checkpoints.
    """
    between = GPU_HOURS[rate] / gpus * 3600
    best = math.sqrt(2 * save_s * between)
    return Goodput(rate, between / 3600, best, _share(best, save_s, between), _share(interval_s, save_s, between))


def _share(interval: float, save: float, between: float) -> float:
    lost = (interval / 2 + RESTART_S) / between
    return max(0.0, 1 - lost) / (1 + save / interval)
