"""Comparison: two checkpoints that answered the same questions on the same rows, compared row by row.

The difference of two figures has a narrower interval than their own two suggest: what is hard for one is hard for the other. So
rows are paired; whole clusters are drawn (a paired bootstrap), and hits on independent rows are put to McNemar's test too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipscale.errors import RequestError
from clipscale.evaluators import Evaluation, Figure, Outcomes
from clipscale.evaluators._outcomes import read_outcomes
from clipscale.intervals import mcnemar, paired_bootstrap
from clipscale.report.records import read_run


@dataclass(frozen=True)
class Change:
    """One figure of two checkpoints A and B."""

    evaluation: str
    figure: str
    a: float
    b: float
    n: int
    headline: bool
    """Whether it is the evaluation's first figure; gates look at these alone, so that one test is made for each question."""
    unit: str
    low: float | None = None
    """95 % interval of B - A; None: the figure is no mean of rows, and nothing is claimed."""
    high: float | None = None
    interval: str | None = None
    wins: int | None = None
    """Rows that B has right and A wrong."""
    losses: int | None = None
    """Rows that A has right and B wrong."""
    p: float | None = None
    """McNemar's exact test; None where rows are not independent, or not right or wrong."""

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a


@dataclass(frozen=True)
class Flip:
    """A row that one checkpoint has right and the other wrong."""

    evaluation: str
    key: str
    truth: str
    answer_a: str
    answer_b: str
    won: bool
    """Whether B has it right."""
    modality: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """Everything that two evaluations have in common."""

    a: str
    b: str
    changes: list[Change]
    flips: list[Flip]
    """Of the headlines, in the data's order."""
    remarks: list[str] = field(default_factory=list)
    """What is not compared, and what was asked differently."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "changes": [{**asdict(change), "difference": change.difference} for change in self.changes]}


def compare(a: Path, b: Path) -> Comparison:
    """Compare two folders that hold an evaluation each.

    Raises:
        RequestError: a folder holds none, or they have no evaluation in common, or the same name stands for other data.
    """
    first, second = read_run(a).evaluations, read_run(b).evaluations
    shared = [name for name in first if name in second]
    if not shared:
        found = " and ".join(f"{folder} has {', '.join(own) or 'none'}" for folder, own in ((a, first), (b, second)))
        raise RequestError(f"nothing to compare: no evaluation has the same name in both; {found}")
    rows = read_outcomes(a), read_outcomes(b)
    result = Comparison(str(a), str(b), [], [], _alone(a, first, second) + _alone(b, second, first))
    for name in shared:
        _check_same_data(name, first[name], second[name])
        result = _with_evaluation(result, name, first[name], second[name], *rows)
    return result


def write(comparison: Comparison, folder: Path) -> Path:
    """Write comparison.json and comparison.html into a folder; returns the page's path."""
    from clipscale.comparison.page import html_page

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = folder / "comparison.html"
    page.write_text(html_page(comparison), encoding="utf-8")
    return page


def dropped(comparison: Comparison, *, at_most: float, certainly: bool) -> list[Change]:
    """Headlines that fell.

    Args:
        at_most: A drop that is put up with, as a share.
        certainly: False: those shown to have dropped by more (all of the interval is beyond it); True: those not shown not to have.
    """
    headlines = [change for change in comparison.changes if change.headline]
    unpaired = [f"{change.evaluation} ({change.figure})" for change in headlines if change.low is None]
    if unpaired:
        raise RequestError(f"no gate can be set on {', '.join(unpaired)}: the headline is no mean of rows, so that nothing is paired")
    bounds = [(change, change.low if certainly else change.high) for change in headlines]
    return [change for change, bound in bounds if bound is not None and bound < -at_most]


def _alone(folder: Path, own: dict[str, Evaluation], other: dict[str, Evaluation]) -> list[str]:
    names = [name for name in own if name not in other]
    return [f"only {folder} has {', '.join(names)}"] if names else []


def _check_same_data(name: str, a: Evaluation, b: Evaluation) -> None:
    """Refuse an evaluation whose rows are not the same on both sides; where the data lie does not matter."""
    hashes = [sorted(part["sha256"] for part in one.provenance["data"].values()) for one in (a, b)]
    if a.kind != b.kind or hashes[0] != hashes[1]:
        raise RequestError(f"'{name}' is not the same evaluation on both sides: {a.kind} and {b.kind}, data {hashes[0]} and {hashes[1]}")


def _with_evaluation(
    so_far: Comparison,
    name: str,
    a: Evaluation,
    b: Evaluation,
    rows_a: dict[tuple[str, str], Outcomes],
    rows_b: dict[tuple[str, str], Outcomes],
) -> Comparison:
    of_b = {figure.name: figure for figure in b.figures}
    pairs = [(figure, of_b[figure.name]) for figure in a.figures if figure.name in of_b]
    changes = [_change(name, *pair, rows_a, rows_b, headline=pair[0] is a.figures[0]) for pair in pairs]
    head = (name, a.figures[0].name)
    flips = _flips(name, rows_a[head], rows_b[head]) if head in rows_a and head in rows_b else []
    settings = [setting for setting in ("prompts", "settings") if a.provenance.get(setting) != b.provenance.get(setting)]
    remarks = [f"{name}: {' and '.join(settings)} differ, not the checkpoint alone"] if settings else []
    return replace(so_far, changes=so_far.changes + changes, flips=so_far.flips + flips, remarks=so_far.remarks + remarks)


def _change(
    name: str,
    a: Figure,
    b: Figure,
    rows_a: dict[tuple[str, str], Outcomes],
    rows_b: dict[tuple[str, str], Outcomes],
    *,
    headline: bool,
) -> Change:
    plain = Change(name, a.name, a.value, b.value, a.n, headline, a.unit)
    before, after = rows_a.get((name, a.name)), rows_b.get((name, b.name))
    if before is None or after is None:
        return plain
    if (before.keys, before.clusters) != (after.keys, after.clusters):
        raise RequestError(f"'{name}', {a.name}: the rows are not the same on both sides, so that they cannot be paired")
    differences = np.array(after.values) - np.array(before.values)
    interval = paired_bootstrap(differences, before.clusters, by=before.by)
    paired = replace(plain, low=interval.low, high=interval.high, interval=interval.method)
    if a.hits is None:
        return paired
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return replace(paired, wins=wins, losses=losses, p=mcnemar(wins, losses) if before.by == "row" else None)


def _flips(name: str, a: Outcomes, b: Outcomes) -> list[Flip]:
    rows = zip(a.keys, a.truths, a.answers, b.answers, a.values, b.values, strict=True)
    return [
        Flip(name, key, truth, answer_a, answer_b, after > before, a.modality, a.source)
        for key, truth, answer_a, answer_b, before, after in rows
        if before != after
    ]
