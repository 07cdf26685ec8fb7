"""The page of a plan: its tables and how memory, time and money go with the number of nodes; one file, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipscale.planning.advice import Suggestion
from clipscale.planning.plan import Plan, Row
from clipscale.planning.tables import Table, dollars, headline, hours, tables
from clipscale.report.axis import memory, number
from clipscale.report.line_chart import Chart, Line, line_chart, steps_of
from clipscale.report.markup import Markup, element
from clipscale.report.page import page_head, page_script
from clipscale.report.records import Curve
from clipscale.report.tables import table, warning_box


def html_page(rows: Sequence[Row], advice: Sequence[Suggestion]) -> str:
    """The whole page."""
    plan = rows[-1].plan
    assert plan is not None, "what was asked for has a plan"
    told = tables(rows, advice)
    body = element(
        "body",
        element(
            "header",
            element("p", "clipscale plan", class_="eyebrow"),
            element("h1", plan.run.name),
            element("p", headline(plan), class_="subtitle"),
            element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in _tiles(plan)], class_="tiles"),
            element("nav", [element("a", each.title, href=f"#{_anchor(each.title)}") for each in told]),
        ),
        element("main", None if plan.fits else warning_box(headline(plan)), [_section(each) for each in told], _charts(rows)),
        element("footer", f"Made by clipscale plan from the settings of {plan.run.name}"),
        page_script(),
    )
    return f"<!doctype html>\n{element('html', page_head(f'{plan.run.name}: plan'), body, lang='en')}\n"


def _tiles(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("memory of a rank", memory(plan.fullest.total)),
        ("samples a second", number(plan.samples_per_second, digits=3)),
        ("MFU", f"{plan.mfu:.0%}"),
        ("run", hours(plan.expected_hours)),
        ("cost", dollars(plan.dollars)),
    ]


def _section(told: Table) -> Markup:
    return element(
        "section",
        element("h2", told.title),
        table(told.columns, told.rows, numbers=range(1, len(told.columns))),
        element("p", told.note, class_="note") if told.note else None,
        id=_anchor(told.title),
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _charts(rows: Sequence[Row]) -> Markup | None:
    plans = [row.plan for row in rows if row.plan is not None]
    if len(plans) < 2:
        return None
    charts = [
        _chart("Samples a second", "", plans, {"samples / s": lambda plan: plan.samples_per_second}),
        _chart("Hours of the run", "h", plans, {"expected": lambda plan: plan.expected_hours, "without failures": lambda plan: plan.hours}),
        _chart("Memory of a rank", "GiB", plans, {"memory": lambda plan: plan.fullest.total / 2**30, "limit": _limit}),
        _chart("Cost", "$", plans, {"expected": lambda plan: plan.dollars}),
    ]
    axis = steps_of(charts)
    return element("section", element("h2", "Nodes"), element("div", [line_chart(chart, axis, []) for chart in charts], class_="charts"))


def _limit(plan: Plan) -> float:
    return plan.gpu.limit_bytes / 2**30


def _chart(title: str, unit: str, plans: Sequence[Plan], curves: dict[str, Callable[[Plan], float]]) -> Chart:
    nodes = np.array([plan.nodes for plan in plans])
    lines = [
        Line(label, Curve(nodes, np.array([value(plan) for plan in plans])), colour=place, dashed=place > 1)
        for place, (label, value) in enumerate(curves.items(), start=1)
    ]
    return Chart(title, lines, unit=unit, from_zero=True, note="By number of nodes.")
