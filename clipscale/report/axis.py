"""Axes: where ticks go, and how numbers are written on them and in text."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a chart; positions are shares of its length, from its low end."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def position(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high one."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """The tick as written beside the axis: every tick of one axis with the same decimals and the same suffix."""
        if self.log or len(self.ticks) < 2:
            return number(tick, digits=3)
        step, largest = self.ticks[1] - self.ticks[0], max(abs(tick) for tick in self.ticks)
        if tick == 0:
            return "0"
        if largest < 1e-2:
            return _scientific(tick, digits=3)
        divisor, suffix = _thousands(largest)
        return f"{tick / divisor:.{_decimals(step / divisor)}f}{suffix}"


def linear_axis(low: float, high: float, *, about: int = 5, snap: bool = True) -> Axis:
    """An axis over [low, high] with about so many round ticks; `snap` moves its ends out to ticks.

    Ends that are equal are moved apart, so that a constant lies in the middle.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1))
    if snap:
        return Axis(ticks[0], ticks[-1], ticks)
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high))


def step_axis(low: float, high: float) -> Axis:
    """The axis of steps: ends where the run ends, ticks only at whole steps."""
    axis = linear_axis(low, high, snap=False)
    return Axis(axis.low, axis.high, tuple(tick for tick in axis.ticks if tick == int(tick)))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis over [low, high], both above 0; ticks at powers of ten, and at 2 and 5 between them when these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    stride = max(1, (last - first) // 6)
    powers = range(first, last + 1, stride)
    wanted = [factor * 10.0**power for power in powers for factor in factors]
    low, high = max(10.0**first, low / 1.3), min(10.0**last, high * 1.3)
    return Axis(low, high, tuple(tick for tick in wanted if low <= tick <= high), log=True)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999))


def _thousands(value: float) -> tuple[float, str]:
    for divisor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= divisor:
            return (1e3 if suffix == "k" else divisor), suffix
    return 1, ""


def _decimals(step: float) -> int:
    """Decimals with which multiples of `step` are told apart."""
    return next(decimals for decimals in range(13) if decimals == 12 or abs(step * 10**decimals - round(step * 10**decimals)) < 1e-6)


def number(value: float, *, digits: int = 4) -> str:
    """A number for reading: so many significant digits, `k`, `M`, `G` for large ones, `1e-4` for small ones."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return _scientific(value, digits=digits)
    divisor, suffix = _thousands(abs(value))
    scaled = value / divisor
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled))))
    return f"{_without_zeros(f'{scaled:.{decimals}f}')}{suffix}"


def _scientific(value: float, *, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{_without_zeros(mantissa)}e{int(exponent)}"


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def memory(value: float) -> str:
    """Bytes in the largest fitting binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{number(value / size, digits=3)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as the two largest units: `2 h 05 min`, `3 min 12 s`, `4.2 s`."""
    if seconds < 60:
        return f"{number(seconds, digits=2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
