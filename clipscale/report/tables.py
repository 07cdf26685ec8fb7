"""Plain tables of names and values, and boxes that warn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clipscale.report.markup import Child, Markup, element


def definitions(values: Mapping[str, Any]) -> Markup:
    """Names and values under each other; a mapping becomes a list of its own."""
    return element("dl", [(element("dt", name), element("dd", _value(value))) for name, value in values.items()])


def _value(value: Any) -> Child:
    if isinstance(value, Mapping):
        return definitions(value) if value else "none"
    if isinstance(value, list | tuple) and not any(isinstance(item, Mapping | list | tuple) for item in value):
        return ", ".join(plain(item) for item in value) or "none"
    return plain(value)


def plain(value: Any) -> str:
    """A value as a reader of YAML would write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return json.dumps(value, ensure_ascii=False, default=str)


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]], *, numbers: Sequence[int] = ()) -> Markup:
    """A table with a head; `numbers` are the columns set flush right."""

    def cell(tag: str, index: int, content: Child) -> Markup:
        return element(tag, content, class_="number" if index in numbers else None)

    head = element("tr", [cell("th", index, title) for index, title in enumerate(columns)])
    body = [element("tr", [cell("td", index, content) for index, content in enumerate(row)]) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="scroll")


def warning_box(text: str) -> Markup:
    """A line the reader should not miss."""
    return element("p", text, class_="warning")
