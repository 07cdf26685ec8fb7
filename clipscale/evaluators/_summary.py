"""Summaries: integer counts become figures with intervals, groups, and the examples a reader looks at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipscale.errors import DataError
from clipscale.evaluators._evaluation import Confusion, Figure, Group, Outcomes
from clipscale.evaluators._scoring import confusion_counts, macro_f1
from clipscale.intervals import bootstrap, cluster_bootstrap, wilson

if TYPE_CHECKING:
    from clipscale.evaluators import Evaluator
    from clipscale.evaluators._embed import Rows
    from clipscale.inputs import Modality

NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Clusters:
    """Which rows go together: rows of one speaker are not independent."""

    of_row: Sequence[str | int]
    by: str
    """What a cluster is: `speaker`, `image`; `row` where rows are independent."""

    @staticmethod
    def by_field(rows: Rows, name: str | None) -> Clusters:
        """Clusters by a record field when the records have it, else independent rows.

        Raises:
            DataError: some records have it and some lack it.
        """
        having = sum(name in record for record in rows.records) if name else 0
        if name is None or not having:
            return Clusters(range(len(rows)), "row")
        if having < len(rows):
            raise DataError(f"{rows.source}: {len(rows) - having} of {len(rows)} records lack '{name}', by which rows go together")
        return Clusters(rows.field(name), name)


def share(name: str, hits: NDArray[np.int64], clusters: Clusters, *, chance: float | None = None) -> Figure:
    """The share of hits (0 or 1 a row): Wilson's interval for independent rows, else a cluster bootstrap."""
    n, total = len(hits), int(hits.sum())
    interval = wilson(total, n) if clusters.by == "row" else cluster_bootstrap(hits, clusters.of_row, by=clusters.by)
    figure = Figure.of(name, total / n, interval, n=n, hits=total, chance=chance)
    return replace(figure, outcomes=_outcomes(hits, clusters))


def mean(name: str, values: NDArray[np.float64], clusters: Clusters) -> Figure:
    """The mean of values in [0, 1]."""
    interval = cluster_bootstrap(values, clusters.of_row, by=clusters.by)
    figure = Figure.of(name, float(values.mean()), interval, n=len(values))
    return replace(figure, outcomes=_outcomes(values, clusters))


def _outcomes(values: NDArray[np.int64] | NDArray[np.float64], clusters: Clusters) -> Outcomes:
    return Outcomes(values.astype(np.float64).tolist(), [str(cluster) for cluster in clusters.of_row], clusters.by)


def with_rows(
    figures: Sequence[Figure], *, keys: Sequence[str], truths: Sequence[str], answers: Sequence[str], modality: Modality, source: str
) -> list[Figure]:
    """The figures, those that are means of rows with what is known of each row."""
    known: dict[str, Any] = {"keys": list(keys), "truths": list(truths), "answers": list(answers), "modality": modality, "source": source}
    return [figure if figure.outcomes is None else replace(figure, outcomes=replace(figure.outcomes, **known)) for figure in figures]


def statistic(name: str, of_weights: Callable[[NDArray[np.float64]], float], n: int, clusters: Clusters) -> Figure:
    """Any statistic in [0, 1] of n weighted rows."""
    interval = bootstrap(of_weights, clusters.of_row, by=clusters.by)
    return Figure.of(name, of_weights(np.ones(n)), interval, n=n)


def macro_f1_figure(name: str, truth: NDArray[np.int64], answer: NDArray[np.int64], clusters: Clusters) -> Figure:
    """Mean F1 over classes."""
    return statistic(name, lambda weights: macro_f1(truth, answer, weights), len(truth), clusters)


def group_hits(names: Sequence[str | int], hits: NDArray[np.int64], order: Sequence[str] | None = None) -> list[Group]:
    """Hits of the rows of each name, in the given order or sorted."""
    counts: dict[str, list[int]] = {}
    for name, hit in zip(names, hits.tolist(), strict=True):
        n_and_hits = counts.setdefault(str(name), [0, 0])
        n_and_hits[0] += 1
        n_and_hits[1] += hit
    intervals = {name: wilson(total, n) for name, (n, total) in counts.items()}
    known = [name for name in (order or sorted(counts)) if name in counts]
    return [Group(name, counts[name][0], counts[name][1], intervals[name].low, intervals[name].high) for name in known]


def confusion(field: str, classes: Sequence[str], truth: NDArray[np.int64], answer: NDArray[np.int64]) -> Confusion:
    """Truth against answers, over all classes."""
    return Confusion(field, list(classes), confusion_counts(truth, answer, len(classes)).tolist())


def example_rows(names: Sequence[str]) -> list[int]:
    """A few rows, the same for every checkpoint: those whose names' hashes come first."""
    return first_by_hash(names, NUM_EXAMPLES)


def first_by_hash(names: Sequence[str], most: int) -> list[int]:
    """At most so many rows, those whose names' hashes come first."""
    return sorted(range(len(names)), key=lambda row: (hashlib.sha256(names[row].encode()).digest(), row))[:most]


def provenance(evaluator: Evaluator, rows: Sequence[Rows], prompts: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    texts = json.dumps([list(own) for own in prompts])
    return {
        "data": {part.source: {"samples": len(part), "sha256": part.fingerprint} for part in rows},
        "prompts": {"count": sum(map(len, prompts)), "sha256": hashlib.sha256(texts.encode()).hexdigest()},
        "settings": evaluator.model_dump(mode="json", serialize_as_any=True),
    }
