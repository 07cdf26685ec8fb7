"""Intervals against published values, closed forms and exact enumeration of all resamples."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from clipscale.intervals import bootstrap, cluster_bootstrap, weighted_median, wilson

NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("hits", "n", "low", "high"), NEWCOMBE)
def test_wilson_equals_newcombes_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    interval = wilson(hits, n)  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)  # the table has four digits
    mirrored = wilson(n - hits, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_wilson_touches_the_ends_exactly_for_no_hit_and_all_hits() -> None:
    assert wilson(0, 7).low == 0.0
    assert wilson(7, 7).high == 1.0


def test_cluster_bootstrap_equals_the_enumeration_of_all_resamples() -> None:
    values, clusters = [1, 1, 0, 1, 0, 0, 0, 1], ["a", "a", "a", "b", "b", "c", "c", "d"]
    rows = {cluster: [v for v, c in zip(values, clusters, strict=True) if c == cluster] for cluster in "abcd"}
    means = [statistics.mean(v for cluster in draw for v in rows[cluster]) for draw in itertools.product("abcd", repeat=4)]
    interval = cluster_bootstrap(values, clusters, by="speaker", resamples=20_000)
    low, high = np.percentile(means, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.03)  # percentiles of a sample of a discrete distribution
    assert interval.method == "cluster bootstrap by speaker"


def test_one_row_a_cluster_gives_the_normal_width() -> None:
    values = np.arange(400) % 10 < 3
    interval = cluster_bootstrap(values, range(400), by="row")
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (interval.low, interval.high) == pytest.approx(
        (0.3 - half, 0.3 + half), abs=0.006
    )  # 2,000 resamples: about 5 % of the half width
    assert interval.method == "bootstrap"


def test_repeating_every_row_ten_times_changes_no_cluster_interval() -> None:
    values, clusters = [1, 0, 1, 1, 0, 0, 1], list("aabbccd")
    once = cluster_bootstrap(values, clusters, by="speaker")
    ten = cluster_bootstrap(values * 10, clusters * 10, by="speaker")
    assert (once.low, once.high) == (ten.low, ten.high)
    rows = cluster_bootstrap(values * 10, range(70), by="row")
    assert rows.high - rows.low < 0.6 * (ten.high - ten.low)  # calling them independent would claim a width 1/√10 of it


def test_agreeing_clusters_get_wilson_with_the_number_of_clusters() -> None:
    interval = cluster_bootstrap([1] * 50, [row % 5 for row in range(50)], by="speaker")
    assert (interval.low, interval.high) == (wilson(5, 5).low, 1.0)
    assert interval.method == "wilson over 5 speakers"
    one = cluster_bootstrap([1, 0, 1], ["a"] * 3, by="speaker")
    assert one.method == "wilson over 1 speaker"
    assert one.high - one.low > 0.7


def test_bootstrap_of_the_mean_equals_cluster_bootstrap() -> None:
    values, clusters = np.array([1.0, 0, 1, 1, 0, 0, 1]), list("aabbccd")
    any_statistic = bootstrap(lambda weights: float(weights @ values / weights.sum()), clusters, by="speaker")
    mean = cluster_bootstrap(values, clusters, by="speaker")
    assert (any_statistic.low, any_statistic.high) == pytest.approx((mean.low, mean.high), abs=1e-12)


def test_bootstrap_of_one_cluster_spans_all_values() -> None:
    interval = bootstrap(np.median, ["a", "a"], by="speaker", bounds=(1.0, 90.0))
    assert (interval.low, interval.high, interval.method) == (1.0, 90.0, "unknown: one speaker")


@pytest.mark.parametrize("seed", range(20))
def test_weighted_median_equals_the_median_of_repeated_values(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, weights = generator.integers(1, 30, size=9), generator.integers(0, 4, size=9)
    weights[0] += 1
    assert weighted_median(values.astype(float), weights.astype(float)) == statistics.median(np.repeat(values, weights).tolist())


def test_intervals_depend_on_the_seed_only() -> None:
    values, clusters = [1, 0, 1, 1, 0], [0, 1, 2, 3, 3]
    assert cluster_bootstrap(values, clusters, by="image", seed=1) == cluster_bootstrap(values, clusters, by="image", seed=1)


def test_intervals_cover_the_truth_as_often_as_they_claim() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        skill = np.clip(generator.normal(0.7, 0.15, size=40), 0, 1)  # 40 speakers who differ; the truth is 0.7
        values = generator.random((40, 20)) < skill[:, None]
        interval = cluster_bootstrap(values.ravel(), np.repeat(np.arange(40), 20).tolist(), by="speaker", seed=trial, resamples=400)
        covered += interval.low <= 0.6987 <= interval.high  # E[clip(N(0.7, 0.15), 0, 1)] = 0.6987, by integration
    assert 0.90 <= covered / 300 <= 0.98
