"""What was evaluated: every figure with its n and interval, confusion pictures, splits by class or speaker, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipscale.evaluators import Evaluation, Example, Figure, Group, Item
from clipscale.report.axis import count, number
from clipscale.report.confusion import confusion_picture
from clipscale.report.markup import Child, Markup, element
from clipscale.report.media import MediaShelf
from clipscale.report.tables import definitions, warning_box

_WORST = 60
"""Classes or speakers listed of one split, those with the fewest hits first."""


def figures_table(evaluations: Mapping[str, Evaluation]) -> Markup:
    """Every figure of every evaluation; the first of each is its headline."""
    numbers = [element("th", title, class_="number") for title in ("Value", "95 % interval", "n")]
    head = element("tr", element("th", "Evaluation"), element("th", "Figure"), numbers, element("th", _scale(), class_="bar"))
    bodies = [
        element("tbody", [_figure_row(name, evaluation, index) for index in range(len(evaluation.figures))])
        for name, evaluation in evaluations.items()
    ]
    return element("div", element("table", element("thead", head), bodies, class_="figures"), class_="scroll")


def _scale() -> Markup:
    return element("span", [element("span", mark) for mark in ("0", "0.5", "1")], class_="scale", aria_hidden="true")


def _figure_row(name: str, evaluation: Evaluation, index: int) -> Markup:
    figure = evaluation.figures[index]
    first = element(
        "th",
        element("a", name, href=f"#{anchor(name)}"),
        element("small", phrase(evaluation.kind)),
        scope="row",
        rowspan=len(evaluation.figures),
    )
    return element(
        "tr",
        first if index == 0 else None,
        element("td", figure_name(figure), class_="headline" if index == 0 else None),
        element("td", value_text(figure), class_="number value"),
        element("td", interval_text(figure), class_="number"),
        element("td", count(figure.n), class_="number"),
        element("td", interval_bar(figure), class_="bar"),
    )


def phrase(name: str) -> str:
    """`zero_shot_classification` as `zero shot classification`."""
    return name.replace("_", " ")


def figure_name(figure: Figure) -> str:
    """The figure's name as read aloud: `image → text R@1` for `image_to_text_R@1`."""
    return phrase(figure.name.replace("_to_", " → ").replace("top1", "top-1").replace("top5", "top-5"))


def value_text(figure: Figure) -> str:
    """Shares with three decimals, ranks as they are."""
    return f"{figure.value:.3f}" if figure.unit == "share" else number(figure.value, digits=3)


def interval_text(figure: Figure) -> str:
    """`0.93 to 0.95`, in the value's own form."""
    if figure.unit == "share":
        return f"{figure.low:.3f} – {figure.high:.3f}"
    return f"{number(figure.low, digits=3)} – {number(figure.high, digits=3)}"


def interval_bar(figure: Figure) -> Markup | None:
    """A share's interval and value between 0 and 1; a hairline stands at what guessing reaches."""
    if figure.unit != "share":
        return None
    low, high, value = (f"{100 * share:.2f}%" for share in (figure.low, figure.high, figure.value))
    told = f"{value_text(figure)}, 95 % interval {interval_text(figure)} ({figure.interval}), n = {count(figure.n)}"
    if figure.hits is not None:
        told += f", {count(figure.hits)} hits"
    chance = None
    if figure.chance is not None:
        at = f"{100 * figure.chance:.2f}%"
        chance = element("line", x1=at, x2=at, y1="3", y2="19", class_="chance")
        told += f"; chance {number(figure.chance, digits=2)}"
    return element(
        "svg",
        element("line", x1="0", x2="100%", y1="11", y2="11", class_="rule"),
        chance,
        element("rect", x="0", y="9.5", width=value, height="3", class_="reach"),
        element("line", x1=low, x2=high, y1="11", y2="11", class_="interval"),
        element("circle", cx=value, cy="11", r="4.5", class_="value"),
        role="img",
        aria_label=told,
        data_tip=told,
    )


def anchor(name: str) -> str:
    """The id of an evaluation's section."""
    return "evaluation-" + "".join(letter if letter.isascii() and letter.isalnum() else f"-{ord(letter):x}-" for letter in name)


def evaluation_section(name: str, evaluation: Evaluation, shelf: MediaShelf) -> Markup:
    """One evaluation in depth."""
    return element(
        "section",
        element("h3", name, element("small", phrase(evaluation.kind))),
        [warning_box(warning) for warning in evaluation.warnings],
        confusion_picture(evaluation.confusion) if evaluation.confusion else None,
        [_split(split, groups) for split, groups in evaluation.groups.items() if groups],
        _examples(evaluation.examples, shelf) if evaluation.examples else None,
        _provenance(evaluation),
        id=anchor(name),
        class_="evaluation",
    )


def _split(split: str, groups: Sequence[Group]) -> Markup:
    """Hits by class, speaker, ..., weakest first."""
    ordered = sorted(groups, key=lambda group: (group.hits / group.n if group.n else 1.0, group.name))
    bars = [_group_row(group) for group in ordered[:_WORST]]
    shown = f"the {_WORST} weakest of {count(len(groups))}" if len(groups) > _WORST else f"{count(len(groups))}, weakest first"
    return element("details", element("summary", f"By {phrase(split)}", element("small", shown)), element("ul", bars, class_="groups"))


def _group_row(group: Group) -> Markup:
    share = Figure(group.name, group.hits / group.n if group.n else 0.0, group.n, group.low, group.high, "wilson", group.hits)
    return element(
        "li",
        element("span", group.name, class_="name", title=group.name),
        interval_bar(share),
        element("span", f"{count(group.hits)} / {count(group.n)}", class_="number"),
    )


def _examples(examples: Sequence[Example], shelf: MediaShelf) -> Markup:
    title = element("h4", "Examples", element("small", "chosen by key, not by how well they went"))
    return element("div", title, element("div", [_card(example, shelf) for example in examples], class_="cards"))


def _card(example: Example, shelf: MediaShelf) -> Markup:
    results = [element("li", _item(item, shelf), class_=_verdict(item)) for item in example.results]
    return element(
        "article",
        element("div", element("span", "Query", class_="role"), _item(example.query, shelf), class_="query"),
        element("ol", results),
        class_="card",
    )


def _verdict(item: Item) -> str | None:
    if item.correct is None:
        return None
    return "right" if item.correct else "wrong"


def _item(item: Item, shelf: MediaShelf) -> list[Child]:
    """Medium, text, and how it was judged: by a sign as well as by colour."""
    sign = None
    if item.correct is not None:
        sign = element("b", "✓" if item.correct else "✗", role="img", aria_label="right" if item.correct else "wrong")
    score = None if item.score is None else element("span", f"{item.score:.2f}", class_="score", title="cosine with the query")
    return [shelf.show(item), element("p", sign, element("span", item.text, class_="text"), score)]


def _provenance(evaluation: Evaluation) -> Markup | None:
    if not evaluation.provenance:
        return None
    return element("details", element("summary", "Data, prompts and settings"), definitions(evaluation.provenance))
