"""The curves of a run, and what happened on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clipscale.report.axis import Axis, count, number
from clipscale.report.line_chart import Chart, Line, Mark, line_chart, steps_of
from clipscale.report.markup import Markup, element
from clipscale.report.records import RunRecords
from clipscale.report.tables import table

_MOST_CHECKPOINTS = 60  # more triangles than this would hide the axis
_LAST_EVENTS = 40


def training_section(run: RunRecords) -> Markup | None:
    """All charts over one axis of steps, and the events; None when no step was recorded."""
    charts = [chart for make in _CHARTS if (chart := make(run)) and chart.lines]
    if not charts:
        return None
    steps = steps_of(charts)
    marks = marks_of(run, steps)
    return element(
        "section",
        element("h2", "Training"),
        _reading_help(marks, steps),
        element("div", [line_chart(chart, steps, marks) for chart in charts], class_="charts"),
        _bad_by_source(run),
        _events(run),
        id="training",
    )


def _reading_help(marks: Sequence[Mark], steps: Axis) -> Markup:
    text = f"Steps {count(steps.low)} to {count(steps.high)}. Point at a chart, or press its arrow keys, to read all charts at one step."
    if any(mark.event == "checkpoint" for mark in marks):
        text += " ▴ on the axis: a checkpoint."
    if any(mark.event == "resumed" for mark in marks):
        text += " Dashed upright: the run was stopped there and resumed from its checkpoint."
    return element("p", text, class_="note")


def marks_of(run: RunRecords, steps: Axis) -> list[Mark]:
    """What happened at which of these steps; a resumption takes the place of the stop before it."""
    marks = [Mark(event["step"], str(event.get("event"))) for event in run.events if isinstance(event.get("step"), int)]
    checkpoints = [mark for mark in marks if mark.event == "checkpoint"]
    resumed = {mark.step for mark in marks if mark.event == "resumed"}
    named = [mark for mark in marks if mark.event == "resumed" or (mark.event == "stopped" and mark.step not in resumed)]
    every = [*(checkpoints if len(checkpoints) <= _MOST_CHECKPOINTS else []), *sorted(dict.fromkeys(named), key=lambda mark: mark.step)]
    return [mark for mark in every if steps.low <= mark.step <= steps.high]


def _kind_lines(run: RunRecords, name: str, *, label: str = "", dashed: bool = False) -> list[Line]:
    """One line a pair kind, of the number called `name`."""
    places = [(colour, kind, ("kinds", kind, name)) for colour, kind in enumerate(run.kinds, start=1)]
    return [Line(f"{kind} {label}".strip(), run.metrics[place], colour, dashed) for colour, kind, place in places if place in run.metrics]


def _loss(run: RunRecords) -> Chart:
    kinds = _kind_lines(run, "loss")
    total = [Line("total", run.metrics[("loss",)])] if ("loss",) in run.metrics and len(kinds) != 1 else []
    return Chart("Loss", [*total, *kinds], note="Mean over the global batch; the strong line is a running mean.", smooth=True)


def _top1(run: RunRecords) -> Chart:
    lines = [line for kind in run.kinds for line in _directions(run, kind)]
    sizes = {kind: settings.get("global_batch") for kind, settings in run.config.get("pair_kinds", {}).items()}
    chances = ", ".join(f"{1 / size:.2g} for {kind}" for kind, size in sizes.items() if size)
    note = "Share of the global batch whose own partner scores highest of all." + (f" Guessing: {chances}." if chances else "")
    return Chart("Top-1 within the batch", lines, note=note, bounds=(0, 1), smooth=True)


def _directions(run: RunRecords, kind: str) -> list[Line]:
    first, second = run.config.get("pair_kinds", {}).get(kind, {}).get("modalities", ("x", "y"))
    colour = run.kinds.index(kind) + 1
    wanted = ((("kinds", kind, "x_to_y_top1"), f"{first} → {second}", False), (("kinds", kind, "y_to_x_top1"), f"{second} → {first}", True))
    return [Line(label, run.metrics[place], colour, dashed) for place, label, dashed in wanted if place in run.metrics]


def _cosines(run: RunRecords) -> Chart:
    own = _kind_lines(run, "mean_positive", label="own partner")
    others = _kind_lines(run, "hardest_negative", label="hardest other", dashed=True)
    return Chart("Cosine", [*own, *others], note="Mean over own partners, and with each row's hardest other.", smooth=True)


def _learning_rate(run: RunRecords) -> Chart:
    return Chart("Learning rate", _single(run, "lr", "learning rate"), from_zero=True)


def _scale(run: RunRecords) -> Chart:
    return Chart("Logit scale", _kind_lines(run, "scale"), unit="1 / temperature", note="Learned factor between cosines and logits.")


def _bias(run: RunRecords) -> Chart:
    return Chart("Logit bias", _kind_lines(run, "bias"))


def _gradient(run: RunRecords) -> Chart:
    return Chart("Gradient norm", _single(run, "grad_norm", "before clipping"), log=True, smooth=True, cut_peaks=True)


def _bad_samples(run: RunRecords) -> Chart:
    lines = [line for line in _single(run, "bad_samples", "left out so far") if line.curve.values.max() > 0]
    return Chart("Unreadable samples", lines, note="Their places in the batch stayed empty; bad_samples.jsonl names them.", from_zero=True)


def _padding(run: RunRecords) -> Chart:
    lines = [
        Line(f"{place[1]} {place[3]}", curve, run.kinds.index(place[1]) + 1, dashed=place[3] == "text")
        for place, curve in run.metrics.items()
        if place[0] == "kinds" and place[2:3] == ("padding",) and curve.values.max() > 0
    ]
    return Chart(
        "Padding", lines, note="Share of a batch's tokens or sound samples that is padding; `bucket_batches` lowers it.", from_zero=True
    )


def _bad_by_source(run: RunRecords) -> Markup | None:
    """What could not be read, counted at the last step."""
    found = [(place[1], place[2], curve.values[-1]) for place, curve in run.metrics.items() if place[0] == "bad_by_source"]
    if not found:
        return None
    rows = [(source, reason, count(number)) for source, reason, number in sorted(found, key=lambda row: (row[0], -row[2]))]
    heading = element("summary", "Unreadable samples", element("small", count(sum(number for *_, number in found))))
    return element("details", heading, table(("Source", "Reason", "Samples"), rows, numbers=(2,)))


def _single(run: RunRecords, name: str, label: str, *, colour: int = 0) -> list[Line]:
    curve = run.metrics.get((name,))
    return [Line(label, curve, colour)] if curve else []


_CHARTS: Sequence[Callable[[RunRecords], Chart]] = (
    _loss,
    _top1,
    _scale,
    _learning_rate,
    _cosines,
    _gradient,
    _bias,
    _bad_samples,
    _padding,
)


def training_tiles(run: RunRecords) -> list[tuple[str, str, str]]:
    """Label, value and remark for what sums the training up."""
    tiles: list[tuple[str, str, str]] = []
    if run.last_step:
        planned = run.config.get("steps")
        tiles.append(("Steps", count(run.last_step), f"of {count(planned)}" if isinstance(planned, int) else ""))
    if ("samples",) in run.metrics:
        tiles.append(("Pairs seen", count(run.metrics[("samples",)].values[-1]), _sources(run)))
    if ("loss",) in run.metrics:
        values = run.metrics[("loss",)].finite().values[-50:]
        tiles.append(("Loss", number(float(values.mean())) if len(values) else "not finite", f"mean of the last {len(values)} steps"))
    return tiles


def _sources(run: RunRecords) -> str:
    kinds = len(run.kinds)
    return f"{kinds} pair kinds" if kinds > 1 else ""


def ending(run: RunRecords) -> tuple[str, str]:
    """Whether the run finished, as a class (`good`, `open`) and in words."""
    turns = [event for event in run.events if event.get("event") in {"finished", "stopped", "started", "resumed"}]
    last = turns[-1] if turns else {}
    if last.get("event") == "finished":
        return "good", "finished"
    if last.get("event") == "stopped":
        return "open", f"stopped at step {count(last.get('step', run.last_step))}"
    return "open", "running, or interrupted"


def _events(run: RunRecords) -> Markup | None:
    if not run.events:
        return None
    last = run.events[-_LAST_EVENTS:]
    rows = [[str(event.get(name) or "") for name in ("time", "step", "event", "detail")] for event in last]
    shown = f"the last {len(last)} of {count(len(run.events))}" if len(last) < len(run.events) else str(len(last))
    events = table(("Time", "Step", "Event", "Detail"), rows, numbers=(1,))
    return element("details", element("summary", "Events", element("small", shown)), events)
