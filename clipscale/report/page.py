"""The page itself: one HTML file that asks the network for nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from clipscale.report.evaluation_section import evaluation_section, figures_table
from clipscale.report.markup import Markup, element
from clipscale.report.media import MediaShelf
from clipscale.report.records import RunRecords
from clipscale.report.setup_section import setup_section
from clipscale.report.tables import warning_box
from clipscale.report.throughput_section import throughput_section, throughput_tiles
from clipscale.report.training_section import ending, training_section, training_tiles

_FOLDER = Path(__file__).parent


def html_page(run: RunRecords) -> str:
    """The whole page."""
    shelf = MediaShelf()
    sections = [
        ("Results", _results(run)),
        ("Training", training_section(run)),
        ("Throughput", throughput_section(run)),
        ("Closer look", _closer_look(run, shelf)),
        ("Setup", setup_section(run)),
    ]
    present = [(title, section) for title, section in sections if section]
    body = element(
        "body",
        _header(run, [title for title, _ in present]),
        element("main", [warning_box(text) for text in [*run.warnings, *_missing_media(shelf)]], [section for _, section in present]),
        element("footer", "Made by clipscale from ", element("code", str(run.folder.resolve()))),
        page_script(),
    )
    return f"<!doctype html>\n{element('html', page_head(run.name), body, lang='en')}\n"


def _own(name: str) -> Markup:
    """A file of this package, as it is."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def page_script() -> Markup:
    """The script that shows values under the pointer."""
    return element("script", _own("page.js"))


def page_head(title: str) -> Markup:
    """The head of a page in this style: only what is in the file is shown, and no script runs but page.js."""
    digest = base64.b64encode(hashlib.sha256(_own("page.js").encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{title} · clipscale"),
        element("style", _own("page.css")),
    )


def _header(run: RunRecords, titles: Sequence[str]) -> Markup:
    state, words = ending(run)
    tiles = [*training_tiles(run), *throughput_tiles(run)]
    return element(
        "header",
        element("p", "clipscale ", "run" if run.trained else "evaluation", class_="eyebrow"),
        element("h1", run.name),
        element("p", element("span", words, class_=f"state {state}") if run.trained else None, _subtitle(run), class_="subtitle"),
        element("dl", [_tile(*tile) for tile in tiles], class_="tiles") if tiles else None,
        element("nav", [element("a", title, href=f"#{_anchor(title)}") for title in titles]),
    )


def _subtitle(run: RunRecords) -> str:
    environment = run.environment
    world, device = environment.get("world"), environment.get("device")
    told = [
        " and ".join(kind.replace("_", "–") for kind in run.kinds),
        f"{world} {'rank' if world == 1 else 'ranks'} on {device}" if world and device else "",
        f"seed {environment['seed']}" if "seed" in environment else "",
        f"started {str(environment['started']).replace('T', ' ').replace('Z', ' UTC')}" if "started" in environment else "",
    ]
    return " · ".join(text for text in told if text)


def _tile(label: str, value: str, remark: str) -> Markup:
    return element("div", element("dt", label), element("dd", value, remark and element("small", remark)))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _results(run: RunRecords) -> Markup | None:
    if not run.evaluations:
        return None
    figures = [figure for evaluation in run.evaluations.values() for figure in evaluation.figures]
    methods = ", ".join(dict.fromkeys(figure.interval for figure in figures))
    chance = " The hairline in a bar is what guessing reaches." if any(figure.chance is not None for figure in figures) else ""
    note = f"Bars show the value as a dot and its 95 % interval ({methods}) as a line.{chance}"
    return element("section", element("h2", "Results"), figures_table(run.evaluations), element("p", note, class_="note"), id="results")


def _closer_look(run: RunRecords, shelf: MediaShelf) -> Markup | None:
    if not run.evaluations:
        return None
    return element(
        "section",
        element("h2", "Closer look"),
        [evaluation_section(name, evaluation, shelf) for name, evaluation in run.evaluations.items()],
        id="closer-look",
    )


def _missing_media(shelf: MediaShelf) -> list[str]:
    return [f"{count} pictures or recordings of the examples are not shown: {reason}" for reason, count in shelf.missing.items()]
