"""How fast a run went, where its time went by phase, how much of the devices' arithmetic that was, and what memory it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipscale.report.axis import count, duration, memory
from clipscale.report.line_chart import Chart, Line, line_chart, steps_of
from clipscale.report.markup import Markup, element
from clipscale.report.records import Curve, Place, RunRecords
from clipscale.report.tables import table
from clipscale.report.training_section import marks_of

_SMALL = 0.01  # phases that take a smaller share of the run are drawn with `other`


def throughput_section(run: RunRecords) -> Markup | None:
    """Charts over the axis of steps, and a table of phases; None when no time was recorded."""
    charts = [chart for make in _CHARTS if (chart := make(run)).lines]
    if not charts:
        return None
    steps = steps_of(charts)
    marks = marks_of(run, steps)
    return element(
        "section",
        element("h2", "Throughput"),
        element("div", [line_chart(chart, steps, marks) for chart in charts], class_="charts"),
        _phases_table(run),
        id="throughput",
    )


def _line(run: RunRecords, place: Place, label: str, *, colour: int = 0, factor: float = 1.0) -> list[Line]:
    curve = run.timings.get(place)
    return [Line(label, Curve(curve.steps, curve.values * factor), colour)] if curve else []


def _rate(run: RunRecords) -> Chart:
    lines = _line(run, ("samples_per_second",), "pairs per second")
    return Chart("Throughput", lines, unit="pairs / s", note="All pair kinds and all ranks together.", from_zero=True, smooth=True)


def _arithmetic(run: RunRecords) -> Chart:
    """MFU where it is known, else what a device achieved."""
    note = "Counted for towers and loss once each, whatever is computed again to save memory."
    lines = _line(run, ("mfu",), "MFU", factor=100)
    if lines:
        return Chart("Model FLOPs utilisation", lines, unit="% of a device's best", note=note, from_zero=True, smooth=True)
    lines = _line(run, ("tflops_per_second",), "a device")
    return Chart("Arithmetic", lines, unit="TFLOP / s and device", note=note, from_zero=True, smooth=True)


def _split(run: RunRecords) -> Chart:
    """The step's time, phase upon phase."""
    curves = _phases(run)
    whole = sum(float(curve.values.sum()) for curve in curves.values())
    small = [name for name, curve in curves.items() if name == "other" or curve.values.sum() < _SMALL * whole]
    lines = [Line(name, curve, colour) for colour, (name, curve) in enumerate(curves.items(), start=1) if name not in small]
    if small:
        rest = Curve(curves[small[0]].steps, np.sum([curves[name].values for name in small], axis=0))
        lines.append(Line("other", rest))
    note = "Mean over ranks. A checkpoint's time is in the step after it."
    return Chart("Where the time goes", lines, unit="seconds a step", note=note, from_zero=True, stacked=True, cut_peaks=True)


def _peaks(run: RunRecords) -> Chart:
    places = [place for place in run.timings if place[0] == "peak_bytes"]
    lines = [line for colour, place in enumerate(places, start=1) for line in _line(run, place, place[1], colour=colour, factor=2**-30)]
    return Chart("Peak memory by phase", lines, unit=f"GiB, {_kind_of_memory(run)}", note="On the rank where it was most.", from_zero=True)


def _kind_of_memory(run: RunRecords) -> str:
    return "allocated on the GPU" if str(run.environment.get("device", "")).startswith("cuda") else "resident"


def _phases(run: RunRecords) -> dict[str, Curve]:
    """Seconds of every phase that took any time."""
    return {place[1]: curve for place, curve in run.timings.items() if place[0] == "phases" and curve.values.any()}


_CHARTS: Sequence[Callable[[RunRecords], Chart]] = (_split, _rate, _arithmetic, _peaks)


def _phases_table(run: RunRecords) -> Markup | None:
    """Every phase: seconds a step, share, on the rank where it took longest, and peak memory."""
    curves = _phases(run)
    if not curves:
        return None
    whole = sum(float(curve.values.sum()) for curve in curves.values())
    several = any(place[0] == "phases_longest" for place in run.timings)
    rows = []
    for name, curve in curves.items():
        longest, peak = run.timings.get(("phases_longest", name)), run.timings.get(("peak_bytes", name))
        slow = [duration(float(longest.values.mean())) if longest else ""] if several else []
        held = memory(float(peak.values.max())) if peak else ""
        rows.append([name, duration(float(curve.values.mean())), f"{100 * curve.values.sum() / whole:.1f} %", *slow, held])
    columns = ["Phase", "Time a step", "Share", *(["On the slowest rank"] if several else []), "Peak memory"]
    return element("details", element("summary", "Phases"), table(columns, rows, numbers=range(1, len(columns))))


def throughput_tiles(run: RunRecords) -> list[tuple[str, str, str]]:
    """Label, value and remark for what sums the speed up."""
    tiles = []
    seconds, rate, mfu = (run.timings.get((name,)) for name in ("seconds", "samples_per_second", "mfu"))
    if seconds:
        waited = run.timings.get(("phases", "data"))
        share = f"{100 * waited.values.sum() / seconds.values.sum():.1f} % waiting for data" if waited else ""
        tiles.append(("Time in steps", duration(float(seconds.values.sum())), share))
    if rate:
        used = f"; MFU {100 * float(np.median(mfu.values)):.1f} %" if mfu else ""
        tiles.append(("Throughput", count(float(np.median(rate.values))), f"pairs / s, median{used}"))
    if ("memory_bytes",) in run.timings:
        tiles.append(("Memory", memory(float(run.timings[("memory_bytes",)].values.max())), f"peak, {_kind_of_memory(run)}"))
    return tiles
