"""Tables: a plan's figures as rows of text, the same for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipscale.planning.advice import Suggestion
from clipscale.planning.plan import Plan, Row
from clipscale.report.axis import count, duration, memory, number


@dataclass(frozen=True)
class Table:
    """A title, columns and rows; the first column is text, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(rows: Sequence[Row], advice: Sequence[Suggestion]) -> list[Table]:
    """Everything there is to tell, of what was asked for and of fewer nodes."""
    plan = rows[-1].plan
    assert plan is not None, "what was asked for has a plan"
    found = [_memory(plan), _advice(plan, advice), _bytes(plan), _time(plan), _run(plan), _failures(plan), _reading(plan), _sweep(rows)]
    return [table for table in found if table.rows]


def headline(plan: Plan) -> str:
    """One sentence."""
    gpus = f"{count(plan.gpus)} {plan.gpu_name}" + (f" in {count(plan.nodes)} nodes" if plan.nodes > 1 else "")
    fits = "fits" if plan.fits else "does NOT fit"
    return (
        f"{plan.run.name} on {gpus} {fits}: {memory(plan.fullest.total)} of {memory(plan.gpu.limit_bytes)} a rank; "
        f"{number(plan.samples_per_second, digits=3)} samples/s, {hours(plan.expected_hours)}, {dollars(plan.dollars)}"
    )


def hours(value: float) -> str:
    """Hours as days and hours."""
    return duration(value * 3600) if value < float("inf") else "never"


def dollars(value: float) -> str:
    """Money, rounded for reading."""
    return f"${number(value, digits=3)}" if value < float("inf") else "no end"


def brief(seconds: float) -> str:
    """A duration; below a second in milliseconds."""
    return duration(seconds) if seconds >= 1 else f"{number(1000 * seconds, digits=2)} ms"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _memory(plan: Plan) -> Table:
    fullest = plan.fullest
    rows = [[name, memory(size), f"{size / fullest.total:.0%}"] for name, size in sorted(fullest.bytes.items(), key=lambda item: -item[1])]
    rows.append([f"all, of {memory(plan.gpu.limit_bytes)}", memory(fullest.total), f"{fullest.total / plan.gpu.limit_bytes:.0%}"])
    rows += [[f"at its fullest in phase {moment.name}", memory(moment.total), ""] for moment in plan.moments if moment is not fullest]
    largest = count(plan.largest_micro_batch) if plan.largest_micro_batch else "none"
    note = (
        f"Fullest in phase {fullest.name}, with {count(plan.layout.micro_batch)} of {count(plan.layout.share)} rows of a rank encoded at a "
        f"time; the most that fits: {largest}. The limit is {plan.gpu.usable:.0%} of the memory."
    )
    return Table("Memory of a rank", ("what", "bytes", "share"), rows, note)


def _advice(plan: Plan, advice: Sequence[Suggestion]) -> Table:
    rows = [[one.change, memory(one.plan.fullest.total), brief(one.plan.step.total), hours(one.plan.expected_hours)] for one in advice]
    if not rows and not plan.fits:
        rows = [["more nodes, GPUs with more memory, or smaller towers: no change of settings alone makes it fit", "", "", ""]]
    return Table("What to change" if not plan.fits else "What would be faster", ("settings", "memory", "step", "run"), rows)


def _bytes(plan: Plan) -> Table:
    rows = [
        [
            f"{each.what} ({each.kind.replace('_', '-')})",
            memory(each.node_bytes),
            memory(each.network_bytes),
            _yes(each.hidden),
        ]
        for each in plan.exchanges
    ]
    best = "the best" if plan.best_grid == plan.grid else f"the best is {plan.best_grid[0]} × {plan.best_grid[1]}"
    note = f"The loss runs on a grid of {plan.grid[0]} × {plan.grid[1]} ranks; {best}." if rows else ""
    return Table("Received by a rank in a step", ("what", "inside the node", "network", "behind towers"), rows, note)


def _time(plan: Plan) -> Table:
    total = plan.step.total
    rows = [[name, brief(seconds), f"{seconds / total:.0%}"] for name, seconds in plan.step.by_phase.items()]
    rows.append(["step", brief(total), f"MFU {plan.mfu:.0%}"])
    gpu = plan.gpu
    note = (
        f"A roofline: products at {gpu.products:.0%} of the published rate, bytes at {gpu.streaming:.0%} of the memory's bandwidth, links "
        f"at {gpu.links:.0%} of theirs, {gpu.launch_us:g} µs at least for an operator. "
        "open_clip's published runs on A100 reached 0.33 to 0.48 of such a plan (docs/planning.md): hosts and data take their part."
    )
    return Table("Time of a step", ("phase", "time", "share"), rows, note)


def _run(plan: Plan) -> Table:
    rows = [
        ["samples a second", number(plan.samples_per_second, digits=3)],
        ["samples a second of one GPU", number(plan.samples_per_second / plan.gpus, digits=3)],
        ["steps", count(plan.run.steps)],
        ["without interruptions", hours(plan.hours)],
        ["with checkpoints, and failures at OPT's rate", hours(plan.expected_hours)],
        ["GPU-hours", number(plan.expected_hours * plan.gpus, digits=3)],
        [f"at ${plan.gpu.dollars_per_hour:g} an hour of a GPU", dollars(plan.dollars)],
    ]
    note = "The price is an assumption; put yours into a file." if plan.gpu.dollars_per_hour else ""
    return Table("The whole run", ("", ""), rows, note)


def _failures(plan: Plan) -> Table:
    rows = [
        [
            each.rate,
            hours(each.hours_between),
            count(max(1, each.best_interval_s / plan.step.total)),
            f"{each.share:.2%}",
            f"{each.share_as_set:.2%}",
        ]
        for each in plan.goodput
    ]
    as_set = count(max(1, plan.run.checkpoints.seconds_between(plan.step.total) / plan.step.total))
    columns = ("failures as in", "between two", "best every_steps", "goodput with it", f"with {as_set}")
    return Table(
        "Checkpoints and failures",
        columns,
        rows,
        f"A checkpoint is {memory(plan.checkpoint_bytes)}; training waits while it is copied, at 5 GB/s.",
    )


def _reading(plan: Plan) -> Table:
    reading = plan.reading
    rows = [
        ["samples a second, of all ranks", number(reading.samples_per_second, digits=3)],
        ["megabytes a second, of all ranks", number(reading.megabytes_per_second, digits=3)],
        ["cores that decode, of each node", count(reading.cores)],
    ]
    return Table("Data", ("", ""), rows, "For JPEGs of 30 kB and FLAC of 120 kB, of which a core decodes 900 and 500 a second.")


def _sweep(rows: Sequence[Row]) -> Table:
    columns = ("nodes", "GPUs", "rows at a time", "memory", "fits", "step", "samples/s", "MFU", "run", "cost")
    told = [_swept(row.plan) if row.plan is not None else [count(row.nodes), *[""] * 8, row.refused] for row in rows]
    return Table("By number of nodes", columns, told if len(rows) > 1 else [])


def _swept(plan: Plan) -> list[str]:
    return [
        count(plan.nodes),
        count(plan.gpus),
        count(plan.layout.micro_batch),
        memory(plan.fullest.total),
        _yes(plan.fits),
        brief(plan.step.total),
        number(plan.samples_per_second, digits=3),
        f"{plan.mfu:.0%}",
        hours(plan.expected_hours),
        dollars(plan.dollars),
    ]
