"""Line charts: numbers over training steps, as inline SVG that keeps its text size at every width.

The drawing has no view box: straight lines and text are placed by percentages, and only the curves live in a nested
drawing that is stretched. page.js reads `data-chart` and writes the values under the pointer into the legend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipscale.report.axis import Axis, count, linear_axis, log_axis, number, step_axis
from clipscale.report.markup import Markup, element
from clipscale.report.records import Curve

MAX_POINTS = 2000
"""Points a curve is drawn with; longer ones keep the smallest and the largest value of every stretch."""
MAX_AREA_POINTS = 400
"""Points an area is drawn with."""
_CANVAS = 10_000  # the nested drawing's units a side


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    curve: Curve
    colour: int = 0
    """0: the colour of text; from 1: a pair kind's."""
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    event: str


@dataclass(frozen=True)
class Chart:
    """What to draw."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    """What the reader should know, in one or two sentences."""
    bounds: tuple[float, float] | None = None
    """Ends of the vertical axis; None: from the values."""
    from_zero: bool = False
    """The vertical axis begins at 0."""
    log: bool = False
    """A logarithmic axis, when the values are above 0 and differ by more than a factor of 30."""
    smooth: bool = False
    """Draw a running mean over the values, which stay visible behind it."""
    stacked: bool = False
    """Lines are parts of a whole, of the same steps: areas on top of each other, from the first line upwards."""
    cut_peaks: bool = False
    """Let the few values that stand far above all others leave the axis; the note then says so."""


def line_chart(chart: Chart, steps: Axis, marks: Sequence[Mark]) -> Markup:
    """A figure with title, legend, drawing and note."""
    values = _value_axis(chart)
    note = " ".join(text for text in (chart.note, _beyond(chart, values)) if text)
    return element(
        "figure",
        element("figcaption", element("h3", chart.title, chart.unit and element("small", chart.unit)), element("span", class_="at")),
        element("ul", [_legend(line) for line in chart.lines], class_="legend"),
        element("div", _drawing(chart, steps, values, marks), class_="plot"),
        element("p", note, class_="note"),
        class_="chart",
        data_chart=_read_out(chart, steps),
    )


def steps_of(charts: Sequence[Chart]) -> Axis:
    """The axis of steps that these charts share."""
    curves = [line.curve for chart in charts for line in chart.lines]
    return step_axis(min(int(curve.steps[0]) for curve in curves), max(int(curve.steps[-1]) for curve in curves))


def _value_axis(chart: Chart) -> Axis:
    if chart.bounds is not None:
        return linear_axis(*chart.bounds)
    finite = [curve.finite().values for curve in _heights(chart)]
    values = np.concatenate([part for part in finite if len(part)] or [np.array([0.0, 1.0])])
    low, high = float(values.min()), float(values.max())
    if chart.cut_peaks and high > 3 * (usual := float(np.quantile(values, 0.99))):
        high = 1.5 * usual
    if chart.log and low > 0 and high / low > 30:
        return log_axis(low, high)
    if chart.from_zero or 0 <= low < 0.4 * high:
        low = min(low, 0.0)
    return linear_axis(low, high)


def _heights(chart: Chart) -> list[Curve]:
    """What the vertical axis has to reach: each curve, or the top of the stack."""
    return [_tops(chart)[-1]] if chart.stacked else [line.curve for line in chart.lines]


def _tops(chart: Chart) -> list[Curve]:
    """The upper edge of each area; of long curves, means over stretches of steps."""
    parts = [averaged(line.curve) for line in chart.lines]
    return [Curve(parts[0].steps, top) for top in np.cumsum([part.values for part in parts], axis=0)]


def _beyond(chart: Chart, axis: Axis) -> str:
    """How many values lie above the axis."""
    above = np.concatenate([curve.values[curve.values > axis.high] for curve in (height.finite() for height in _heights(chart))])
    return f"Above the axis: {count(len(above))} values, up to {number(float(above.max()), digits=3)}." if len(above) else ""


def _legend(line: Line) -> Markup:
    last = line.curve.finite().values
    return element(
        "li",
        element("i", class_="dashed" if line.dashed else "solid"),
        element("span", line.label),
        element("output", number(float(last[-1])) if len(last) else ""),
        class_=_colour(line),
    )


def _colour(line: Line) -> str:
    return f"colour{(line.colour - 1) % 8 + 1 if line.colour else 0}"


def _drawing(chart: Chart, steps: Axis, values: Axis, marks: Sequence[Mark]) -> Markup:
    return element(
        "svg",
        [_value_tick(values, tick) for tick in values.ticks],
        [_step_tick(steps, tick) for tick in steps.ticks],
        [_mark(steps, mark) for mark in marks],
        _mark_names(steps, marks),
        element(
            "svg",
            _areas(chart, steps, values) if chart.stacked else [_curve(line, steps, values, smooth=chart.smooth) for line in chart.lines],
            viewBox=f"0 0 {_CANVAS} {_CANVAS}",
            preserveAspectRatio="none",
            width="100%",
            height="100%",
        ),
        element("line", class_="cursor", y1="0", y2="100%"),
        role="img",
        tabindex="0",
        aria_label=_description(chart),
    )


def _description(chart: Chart) -> str:
    parts = []
    for line in chart.lines:
        values = line.curve.finite().values
        if len(values):
            parts.append(f"{line.label} from {number(float(values[0]))} to {number(float(values[-1]))}")
    return f"{chart.title} by step: {'; '.join(parts)}"


def _value_tick(axis: Axis, tick: float) -> Markup:
    at = f"{100 * (1 - axis.position(tick)):.2f}%"
    return element(
        "g",
        element("line", x1="0", x2="100%", y1=at, y2=at, class_="base" if tick == axis.low else "rule"),
        element("text", axis.label(tick), x="-8", y=at, dy="0.32em", text_anchor="end"),
    )


def _step_tick(axis: Axis, tick: float) -> Markup:
    at = f"{100 * axis.position(tick):.2f}%"
    return element("text", axis.label(tick), x=at, y="100%", dy="20", text_anchor="middle")


def _mark(steps: Axis, mark: Mark) -> Markup:
    """A checkpoint as a small triangle on the axis, everything else as an upright line."""
    at = f"{100 * steps.position(mark.step):.2f}%"
    if mark.event == "checkpoint":
        triangle = element("path", element("title", f"checkpoint at step {count(mark.step)}"), d="M0 1l-4 6h8z")
        return element("svg", triangle, x=at, y="100%", class_="checkpoint", overflow="visible")
    return element("line", x1=at, x2=at, y1="0", y2="100%", class_="event")


def _mark_names(steps: Axis, marks: Sequence[Mark]) -> list[Markup]:
    """The names above upright lines; one that would touch the name before it is left out."""
    names, named_to = [], -1.0
    for mark in marks:
        share = steps.position(mark.step)
        if mark.event == "checkpoint" or share < named_to:
            continue
        side = "end" if share > 0.9 else "start" if share < 0.1 else "middle"
        names.append(element("text", mark.event, x=f"{100 * share:.2f}%", y="-5", text_anchor=side, class_="mark"))
        named_to = share + 0.2
    return names


def _curve(line: Line, steps: Axis, values: Axis, *, smooth: bool) -> Markup:
    dashes = "6 4" if line.dashed else None
    finite = line.curve.finite()
    strong = element("path", d=_path(line.curve, steps, values), class_="line", stroke_dasharray=dashes, vector_effect="non-scaling-stroke")
    if not smooth or len(finite) < 60:
        return element("g", strong, class_=_colour(line))
    faint = element("path", d=_path(line.curve, steps, values), class_="faint", vector_effect="non-scaling-stroke")
    mean = _path(running_mean(finite), steps, values)
    strong = element("path", d=mean, class_="line", stroke_dasharray=dashes, vector_effect="non-scaling-stroke")
    return element("g", faint, strong, class_=_colour(line))


def _areas(chart: Chart, steps: Axis, values: Axis) -> list[Markup]:
    """Along each top, and back along the one below."""
    tops = _tops(chart)
    areas, below = [], Curve(tops[0].steps, np.zeros(len(tops[0])))
    for line, top in zip(chart.lines, tops, strict=True):
        back = _path(_reversed(below), steps, values)
        areas.append(element("path", d=f"{_path(top, steps, values)}L{back[1:]}Z", class_=f"area {_colour(line)}"))
        below = top
    return areas


def _reversed(curve: Curve) -> Curve:
    return Curve(curve.steps[::-1], curve.values[::-1])


def averaged(curve: Curve, limit: int = MAX_AREA_POINTS) -> Curve:
    """At most `limit` points: means over stretches of steps, each at the stretch's middle, the first and the last at the curve's ends."""
    if len(curve) <= limit:
        return curve
    stretches = np.array_split(np.arange(len(curve)), limit)
    middles = curve.steps[[stretch[len(stretch) // 2] for stretch in stretches]]
    middles[0], middles[-1] = curve.steps[0], curve.steps[-1]
    return Curve(middles, np.array([curve.values[stretch].mean() for stretch in stretches]))


def _path(curve: Curve, steps: Axis, values: Axis) -> str:
    """SVG path data; lifted where a value is not finite, a dot where a value stands alone."""
    parts, drawing = [], False
    thinned = thin(curve)
    for step, value in zip(thinned.steps.tolist(), thinned.values.tolist(), strict=True):
        if not math.isfinite(value):
            drawing = False
            continue
        x, y = _CANVAS * steps.position(step), _CANVAS * (1 - values.position(value))
        parts.append(f"{'L' if drawing else 'M'}{x:.0f} {y:.0f}")
        drawing = True
    return "".join(parts) + ("h1" if len(parts) == 1 else "")


def running_mean(curve: Curve) -> Curve:
    """The mean over a centred window of one fiftieth of the curve, cut off at its ends."""
    size, half = len(curve), max(1, len(curve) // 100)
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    first, last = np.maximum(np.arange(size) - half, 0), np.minimum(np.arange(size) + half + 1, size)
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


def thin(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """At most `limit` points: of every stretch of steps the smallest and the largest value, in their order; both ends stay.

    Values that are not finite are kept only where a stretch holds nothing else.
    """
    if len(curve) <= limit:
        return curve
    stretches = np.array_split(np.arange(1, len(curve) - 1), (limit - 2) // 2)
    keep = {0, len(curve) - 1}
    for stretch in stretches:
        finite = stretch[np.isfinite(curve.values[stretch])]
        among = finite if len(finite) else stretch[:1]
        keep |= {int(among[curve.values[among].argmin()]), int(among[curve.values[among].argmax()])}
    kept = np.array(sorted(keep))
    return Curve(curve.steps[kept], curve.values[kept])


def _read_out(chart: Chart, steps: Axis) -> str:
    """What page.js needs to show values under the pointer."""
    lines = []
    for line in chart.lines:
        curve = thin(line.curve.finite())
        lines.append({"steps": curve.steps.tolist(), "values": [number(value) for value in curve.values.tolist()]})
    return json.dumps({"low": steps.low, "high": steps.high, "lines": lines}, separators=(",", ":"))
