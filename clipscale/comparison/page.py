"""The page of a comparison: every change with its interval, and rows that flipped, with their pictures and recordings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from clipscale.comparison import Change, Comparison, Flip
from clipscale.evaluators import Item
from clipscale.report.axis import count
from clipscale.report.evaluation_section import phrase
from clipscale.report.markup import Markup, element
from clipscale.report.media import MediaShelf
from clipscale.report.page import page_head
from clipscale.report.tables import warning_box

MOST_FLIPS = 12
"""Rows shown of those won, and of those lost, by evaluation."""


def html_page(comparison: Comparison) -> str:
    """One self-contained file."""
    shelf = MediaShelf()
    names = dict.fromkeys(flip.evaluation for flip in comparison.flips)
    flips = [_flips(name, [flip for flip in comparison.flips if flip.evaluation == name], shelf) for name in names]
    missing = [f"{number} pictures or recordings are not shown: {reason}" for reason, number in shelf.missing.items()]
    note = "Differences are B - A over the same rows; rows are paired, which makes the 95 % intervals narrower than those of A and B alone."
    head = element(
        "header",
        element("p", "clipscale comparison", class_="eyebrow"),
        element("h1", "A and B"),
        element("p", "A: ", element("code", comparison.a), " B: ", element("code", comparison.b), class_="subtitle"),
    )
    main = element(
        "main",
        [warning_box(text) for text in [*comparison.remarks, *missing]],
        element("section", element("h2", "Changes"), changes_table(comparison.changes), element("p", note, class_="note")),
        flips,
    )
    return f"<!doctype html>\n{element('html', page_head('comparison'), element('body', head, main), lang='en')}\n"


def changes_table(changes: Sequence[Change]) -> Markup:
    """Every figure of both."""
    titles = ("Evaluation", "Figure", "A", "B", "B - A", "95 % interval", "n", "won / lost", "p")
    head = element("tr", [element("th", title, class_="number" if number > 1 else None) for number, title in enumerate(titles)])
    return element("div", element("table", element("thead", head), element("tbody", [_row(change) for change in changes])), class_="scroll")


def _row(change: Change) -> Markup:
    cells = cell_texts(change)
    return element(
        "tr",
        element("th", change.evaluation, scope="row"),
        element("td", phrase(change.figure), class_="headline" if change.headline else None),
        [element("td", cell, class_="number") for cell in cells],
        title=change.interval,
    )


def cell_texts(change: Change) -> list[str]:
    """A, B, their difference, its interval, n, rows won and lost, and p; empty where nothing can be said."""
    digits = 1 if change.unit == "rank" else 3
    interval = "" if change.low is None or change.high is None else f"{change.low:+.3f} to {change.high:+.3f}"
    return [
        f"{change.a:.{digits}f}",
        f"{change.b:.{digits}f}",
        f"{change.difference:+.{digits}f}",
        interval,
        count(change.n),
        "" if change.wins is None or change.losses is None else f"{count(change.wins)} / {count(change.losses)}",
        "" if change.p is None else f"{change.p:.2g}",
    ]


def _flips(name: str, flips: Sequence[Flip], shelf: MediaShelf) -> Markup:
    won, lost = ([flip for flip in flips if flip.won is wanted] for wanted in (True, False))
    parts = [
        _cards(title, chosen, shelf) for title, chosen in (("B alone has them right", won), ("A alone has them right", lost)) if chosen
    ]
    return element("section", element("h2", name), parts, class_="evaluation")


def _cards(title: str, flips: Sequence[Flip], shelf: MediaShelf) -> Markup:
    chosen = sorted(flips, key=lambda flip: hashlib.sha256(f"{flip.key}\n{flip.truth}".encode()).digest())[:MOST_FLIPS]
    shown = (
        f"{count(len(flips))} rows, {len(chosen)} of them shown, chosen by key" if len(chosen) < len(flips) else f"{count(len(flips))} rows"
    )
    return element(
        "div", element("h4", title, element("small", shown)), element("div", [_card(flip, shelf) for flip in chosen], class_="cards")
    )


def _card(flip: Flip, shelf: MediaShelf) -> Markup:
    item = Item(flip.modality, flip.key, flip.source, flip.truth)  # type: ignore[arg-type]
    answers = [("A", flip.answer_a, not flip.won), ("B", flip.answer_b, flip.won)]
    listed = [
        element("li", element("p", element("b", "✓ " if right else "✗ "), element("span", f"{side}: {answer}", class_="text")),
                class_="right" if right else "wrong")
        for side, answer, right in answers
    ]  # fmt: skip
    query = element("div", element("span", flip.key, class_="role"), shelf.show(item), element("p", flip.truth), class_="query")
    return element("article", query, element("ol", listed), class_="card")
