"""Confusion pictures: which class was taken for which, as a heat map; and the mistakes made most often, in words."""

from __future__ import annotations

from clipscale.evaluators import Confusion
from clipscale.report.axis import count
from clipscale.report.markup import Markup, element
from clipscale.report.tables import table

MOST_CLASSES = 80
"""Classes a heat map can hold; with more of them only the list of mistakes is shown."""
_MISTAKES = 10
_SHRINKS_BELOW = 480  # width up to which a heat map shrinks on a narrow page; a wider one is scrolled
_LETTER = 6.6  # width of an average letter at 12 px


def confusion_picture(confusion: Confusion) -> Markup:
    """Heat map and list of mistakes, side by side."""
    picture = _heat_map(confusion) if len(confusion.classes) <= MOST_CLASSES else None
    return element("div", picture, _mistakes(confusion), class_="confusion")


def _heat_map(confusion: Confusion) -> Markup:
    """Rows are truths, columns answers. Short names stand on both axes; long ones on the rows, whose numbers head the columns."""
    names, size = confusion.classes, _cell_size(len(confusion.classes))
    numbered = _LETTER * max(map(len, names)) > size
    rows = [f"{name}  {index}" for index, name in enumerate(names, start=1)] if numbered else names
    columns = [str(index) for index in range(1, len(names) + 1)] if numbered else names
    left = 10 + round(_LETTER * min(42, max(map(len, rows))))
    width, height = left + size * len(names) + 2, 26 + size * len(names) + 2
    drawing = element(
        "svg",
        [_row_name(name, left - 8, 26 + size * (index + 0.5)) for index, name in enumerate(rows)],
        [element("text", name, x=left + size * (index + 0.5), y=18, text_anchor="middle") for index, name in enumerate(columns)],
        element("rect", x=left, y=26, width=size * len(names), height=size * len(names), class_="frame"),
        [
            _cell(confusion, truth, answer, left + size * answer, 26 + size * truth, size)
            for truth, row in enumerate(confusion.counts)
            for answer, times in enumerate(row)
            if times
        ],
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        class_="fits" if width < _SHRINKS_BELOW else None,
        role="img",
        aria_label=f"Confusion of {len(names)} classes of {confusion.field}; rows are truths, columns answers",
    )
    caption = element("figcaption", f"Rows: true {confusion.field}. Columns: answer", " (by the row's number)." if numbered else ".")
    return element("figure", caption, element("div", drawing, class_="scroll"), _key(), class_="heat")


def _cell_size(classes: int) -> int:
    return max(13, min(36, 620 // classes))


def _row_name(name: str, x: float, y: float) -> Markup:
    shown = name if len(name) <= 42 else f"…{name[-41:]}"
    return element("text", shown, x=x, y=y, dy="0.34em", text_anchor="end", style="white-space:pre")


def _cell(confusion: Confusion, truth: int, answer: int, x: float, y: float, size: int) -> Markup:
    times, total = confusion.counts[truth][answer], sum(confusion.counts[truth])
    share = times / total
    right = truth == answer
    told = f"{confusion.classes[truth]} → {confusion.classes[answer]}: {count(times)} of {count(total)} ({100 * share:.1f} %)"
    fill = element(
        "rect",
        x=x + 0.5,
        y=y + 0.5,
        width=size - 1,
        height=size - 1,
        rx=2,
        class_="right" if right else "wrong",
        fill_opacity=f"{_strength(share):.3f}",
    )
    written = element(
        "text",
        str(times),
        x=x + size / 2,
        y=y + size / 2,
        dy="0.34em",
        text_anchor="middle",
        class_="on" if _strength(share) > 0.55 else None,
    )
    return element("g", fill, written if size >= 13 + 5 * len(str(times)) else None, data_tip=told)


def _strength(share: float) -> float:
    """How strongly a cell is coloured: a single mistake among hundreds is still seen."""
    return float(0.1 + 0.85 * share**0.6)


def _key() -> Markup:
    right, wrong = (element("i", class_=f"swatch {kind}") for kind in ("right", "wrong"))
    return element("p", right, "right ", wrong, "wrong; the stronger, the larger its share of the row", class_="note")


def _mistakes(confusion: Confusion) -> Markup:
    """The mistakes made most often, in words."""
    made = [
        (times, sum(row), confusion.classes[truth], confusion.classes[answer])
        for truth, row in enumerate(confusion.counts)
        for answer, times in enumerate(row)
        if times and truth != answer
    ]
    if not made:
        return element("p", "No mistakes: every row has its class right.", class_="note")
    made.sort(key=lambda mistake: -mistake[0])
    rows = [(truth, answer, count(times), f"{100 * times / total:.1f} %") for times, total, truth, answer in made[:_MISTAKES]]
    title = f"The {_MISTAKES} most frequent of {count(len(made))} mistakes" if len(made) > _MISTAKES else "All mistakes"
    mistakes = table(("Truth", "Answer", "Times", "Of class"), rows, numbers=(2, 3))
    return element("div", element("h4", title), mistakes, class_="mistakes")
