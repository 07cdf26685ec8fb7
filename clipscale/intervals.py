"""Intervals: how far a figure may lie from the truth, by Wilson's formula or by resampling clusters of rows.

Independent rows: Wilson 1927 (score interval; never leaves [0, 1], right also for 0 or n hits). Rows that share a
speaker or an image are not independent: whole clusters are drawn with replacement (Efron and Tibshirani 1993, chapter 13,
percentile interval). Everything is 95 % and a pure function of its arguments, the seed included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
RESAMPLES = 2000
"""Bootstrap resamples: the percentiles' own noise is then about 2 % of the interval's width."""
_CHUNK = 1 << 22  # cluster draws held at once: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was made."""

    low: float
    high: float
    method: str


def wilson(hits: float, n: int) -> Interval:
    """Wilson's score interval for a proportion of `hits` in `n` independent rows."""
    low, high = _wilson(hits / n, n)
    return Interval(low, high, "wilson")


def cluster_bootstrap(values: ArrayLike, clusters: Sequence[Hashable], *, by: str, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Interval of the mean of `values` (each in [0, 1]) when rows of one cluster go together.

    Where the resamples cannot differ (one cluster, or the same mean in all of them) the bootstrap would claim certainty;
    Wilson's formula with the number of clusters as n stands in, and `method` says so.
    """
    rows = np.asarray(values, dtype=np.float64)
    cluster_of_row, num_clusters = _number(clusters)
    sizes = np.bincount(cluster_of_row, minlength=num_clusters)
    sums = np.bincount(cluster_of_row, weights=rows, minlength=num_clusters)
    if np.ptp(sums / sizes) == 0.0:
        return _wilson_over_clusters(float(rows.mean()), num_clusters, by)
    means = [(counts @ sums) / (counts @ sizes) for counts in _draws(num_clusters, seed, resamples)]
    return _percentiles(np.concatenate(means), _label(by))


def paired_bootstrap(
    differences: ArrayLike, clusters: Sequence[Hashable], *, by: str, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Interval of the mean of differences (each in [-1, 1]) between two measurements of the same rows; clusters go together.

    Where all differences are equal the resamples cannot differ; Wilson's bound for 0 hits among the clusters then says how many
    rows may differ otherwise, and `method` says so.
    """
    rows = np.asarray(differences, dtype=np.float64)
    cluster_of_row, num_clusters = _number(clusters)
    sizes = np.bincount(cluster_of_row, minlength=num_clusters)
    sums = np.bincount(cluster_of_row, weights=rows, minlength=num_clusters)
    if np.ptp(sums / sizes) == 0.0:
        reach, middle = _wilson(0.0, num_clusters)[1], float(rows.mean())
        return Interval(max(-1.0, middle - reach), min(1.0, middle + reach), f"wilson over {num_clusters} {by}{'s' * (num_clusters > 1)}")
    means = [(counts @ sums) / (counts @ sizes) for counts in _draws(num_clusters, seed, resamples)]
    return _percentiles(np.concatenate(means), f"paired {_label(by)}")


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p of McNemar's exact test: of the rows on which two classifiers differ, were half won by each?

    McNemar 1947; the binomial form, right also for few rows. Rows must be independent.
    """
    n, fewer = wins + losses, min(wins, losses)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def bootstrap(
    statistic: Callable[[NDArray[np.float64]], float],
    clusters: Sequence[Hashable],
    *,
    by: str,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of any statistic of weighted rows: `statistic` gets one weight a row, how often it was drawn.

    `bounds`: the statistic's range. From one cluster nothing can be said, so the interval is all of it; and when every
    resample agrees on a bound of [0, 1], Wilson's formula over the clusters stands in.
    """
    cluster_of_row, num_clusters = _number(clusters)
    if num_clusters == 1:
        return Interval(*bounds, f"unknown: one {by}")
    drawn = [statistic(count[cluster_of_row].astype(np.float64)) for counts in _draws(num_clusters, seed, resamples) for count in counts]
    samples = np.array(drawn)
    if bounds == (0.0, 1.0) and np.ptp(samples) == 0.0:
        return _wilson_over_clusters(float(samples[0]), num_clusters, by)
    return _percentiles(samples, _label(by))


def weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The median of each value repeated `weights` times; the mean of the middle two for an even count."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order])
    half = upto[-1] / 2
    lower = values[order[np.searchsorted(upto, half, side="left")]]
    upper = values[order[min(np.searchsorted(upto, half, side="right"), len(order) - 1)]]
    return float(lower + upper) / 2


def _wilson(proportion: float, n: int) -> tuple[float, float]:
    centre = (proportion + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(proportion * (1 - proportion) / n + Z * Z / (4 * n * n))
    low = 0.0 if proportion == 0 else max(0.0, centre - half)  # exactly 0 and 1 at the ends, not 1e-17 beside them
    high = 1.0 if proportion == 1 else min(1.0, centre + half)
    return low, high


def _wilson_over_clusters(proportion: float, num_clusters: int, by: str) -> Interval:
    return Interval(*_wilson(proportion, num_clusters), f"wilson over {num_clusters} {by}{'s' * (num_clusters > 1)}")


def _number(clusters: Sequence[Hashable]) -> tuple[NDArray[np.int64], int]:
    """Clusters as numbers in order of first appearance, and how many there are."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64), len(numbers)


def _draws(num_clusters: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each cluster was drawn, [r, num_clusters] at a time, `resamples` rows in all."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(1, _CHUNK // num_clusters)
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = generator.integers(num_clusters, size=(r, num_clusters)) + np.arange(r)[:, None] * num_clusters
        yield np.bincount(drawn.ravel(), minlength=r * num_clusters).reshape(r, num_clusters)


def _percentiles(samples: NDArray[np.float64], method: str) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(low), float(high), method)


def _label(by: str) -> str:
    return "bootstrap" if by == "row" else f"cluster bootstrap by {by}"
