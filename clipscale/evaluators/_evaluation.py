"""The result of an evaluator: figures with n and intervals, and what a reader wants to see behind them, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from clipscale.inputs import Modality
from clipscale.intervals import Interval


@dataclass(frozen=True)
class Outcomes:
    """The rows behind a figure that is their mean: what two checkpoints are compared by, row by row."""

    values: list[float]
    """Each row's share in the figure: 0 or 1, or a reciprocal rank."""
    clusters: list[str]
    """Which rows go together, and are drawn together."""
    by: str
    """What a cluster is; `row` where rows are independent."""
    keys: list[str] = field(default_factory=list)
    """The sample of each row; with captions as queries, several rows have one."""
    truths: list[str] = field(default_factory=list)
    """What is right."""
    answers: list[str] = field(default_factory=list)
    """What the model said."""
    modality: Modality = "text"
    """Of the samples."""
    source: str = ""
    """The samples' data set."""


@dataclass(frozen=True)
class Figure:
    """One number, never without its n and its 95 % interval."""

    name: str
    value: float
    n: int
    """Rows (queries, samples) it is taken over."""
    low: float
    high: float
    interval: str
    """How low and high were made: `wilson`, `cluster bootstrap by speaker`, ..."""
    hits: int | None = None
    """Where the figure is a share of rows: how many, exactly."""
    chance: float | None = None
    """What guessing reaches."""
    unit: Literal["share", "rank", "number"] = "share"
    """`share`: in [0, 1], more is better but for `confidence` and `calibration_error`; `rank`: from 1, less is better;
    `number`: of a scale of its own."""
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)
    """The rows, where the figure is their mean; they are written beside the figures, not among them."""

    @staticmethod
    def of(name: str, value: float, interval: Interval, *, n: int, hits: int | None = None, chance: float | None = None) -> Figure:
        """A share in [0, 1] with its interval."""
        return Figure(name, value, n, interval.low, interval.high, interval.method, hits, chance)


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each: `counts[truth][answer]`, in the order of `classes`."""

    field: str
    """The record field the classes are values of."""
    classes: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class Group:
    """Hits among the rows of one class or one speaker, with Wilson's interval."""

    name: str
    n: int
    hits: int
    low: float
    high: float


@dataclass(frozen=True)
class Item:
    """One sample, or one text, as an example shows it."""

    modality: Modality
    key: str
    """The sample's key in its data set; empty for a prompt, which belongs to none."""
    source: str
    """The data set's address; empty for a prompt."""
    text: str
    """What to print beside it: caption, transcript, class or prompt."""
    score: float | None = None
    """Cosine with the query."""
    correct: bool | None = None


@dataclass(frozen=True)
class Example:
    """A query and what came back for it, best first."""

    query: Item
    results: list[Item]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluator found."""

    name: str
    """The evaluation's name in the configuration; the evaluator's own until `evaluate.py` sets it."""
    kind: str
    """The evaluator's name."""
    figures: list[Figure]
    """The first one is the headline."""
    confusion: Confusion | None = None
    groups: dict[str, list[Group]] = field(default_factory=dict)
    """Hits behind the headline split by what the key says: `class`, `speaker`, ..."""
    examples: list[Example] = field(default_factory=list)
    """A few, chosen by the hash of the query's key, not by how well they went."""
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    """Data and prompt fingerprints and the evaluator's settings: what the figures depend on besides the model."""

    def figure(self, name: str) -> Figure:
        """The figure called `name`."""
        return next(figure for figure in self.figures if figure.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(replace(self, figures=[replace(figure, outcomes=None) for figure in self.figures]))
        for figure in values["figures"]:
            del figure["outcomes"]
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> Evaluation:
        """The evaluation that `to_json` wrote."""
        parts = {
            "figures": [Figure(**figure) for figure in values["figures"]],
            "confusion": values["confusion"] and Confusion(**values["confusion"]),
            "groups": {split: [Group(**group) for group in groups] for split, groups in values["groups"].items()},
            "examples": [Example(Item(**e["query"]), [Item(**item) for item in e["results"]]) for e in values["examples"]],
        }
        return Evaluation(**{**values, **parts})
