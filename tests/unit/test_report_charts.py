"""Charts of the report: where ticks, curves and thinned points lie, and how numbers are written."""

from __future__ import annotations

import numpy as np
import pytest
from html_tree import Node, Page

from clipscale.report.axis import count, duration, linear_axis, log_axis, memory, number
from clipscale.report.line_chart import Chart, Line, averaged, line_chart, running_mean, steps_of, thin
from clipscale.report.records import Curve


def curve(values: list[float]) -> Curve:
    return Curve(np.arange(1, len(values) + 1), np.array(values, np.float64))


def draw(chart: Chart) -> Node:
    return Page(line_chart(chart, steps_of([chart]), [])).root


def test_a_curve_goes_through_its_values() -> None:
    drawn = draw(Chart("Loss", [Line("total", curve([0.0, 10.0, 5.0]))]))
    (path,) = drawn.all("path", "line")
    assert path.attributes["d"] == "M0 10000L5000 0L10000 5000"  # of 10,000 each way, from the top left
    labels = [text.text for text in drawn.all("text")]
    assert labels == ["0", "2", "4", "6", "8", "10", "1", "2", "3"]


def test_a_curve_is_lifted_where_a_value_is_not_finite() -> None:
    (path,) = draw(Chart("Loss", [Line("total", curve([0.0, float("nan"), 4.0, 10.0]))])).all("path", "line")
    assert path.attributes["d"] == "M0 10000M6667 6000L10000 0"


def test_values_far_above_all_others_may_leave_the_axis_and_are_told() -> None:
    values = [1.0] * 300
    values[0] = 70.0
    drawn = draw(Chart("Step time", [Line("step", curve(values))], from_zero=True, cut_peaks=True))
    assert drawn.all("p")[0].text == "Above the axis: 1 values, up to 70."
    assert max(float(text.text) for text in drawn.all("text") if text.attributes["x"] == "-8") == 1.5


def test_areas_stand_on_each_other_and_the_axis_reaches_their_top() -> None:
    lines = [Line("encode", curve([1.0, 3.0]), 1), Line("other", curve([4.0, 7.0]))]
    drawn = draw(Chart("Where the time goes", lines, from_zero=True, stacked=True))
    first, second = (path.attributes["d"] for path in drawn.all("path", "area"))
    assert first == "M0 9000L10000 7000L10000 10000L0 10000Z"  # up to 1 and 3 of 10, back along the bottom
    assert second == "M0 5000L10000 0L10000 7000L0 9000Z"  # up to 5 and 10, back along the first


def test_long_areas_are_means_over_stretches_and_keep_the_ends() -> None:
    shown = averaged(curve([float(number % 4) for number in range(1600)]))
    assert len(shown) == 400
    assert (shown.steps[0], shown.steps[-1]) == (1, 1600)
    assert (shown.values == 1.5).all()


def test_long_curves_are_thinned_to_2000_points_with_their_extremes() -> None:
    values = np.sin(np.arange(100_000) / 7_000)
    values[[31_415, 27_182]] = (55.0, -55.0)
    thinned = thin(Curve(np.arange(100_000), values))
    assert len(thinned) <= 2000
    assert (np.diff(thinned.steps) > 0).all()
    assert {0, 31_415, 27_182, 99_999} <= set(thinned.steps.tolist())
    assert (thinned.values == values[thinned.steps]).all()


def test_running_mean_is_the_mean_of_the_window_cut_off_at_the_ends() -> None:
    assert running_mean(curve([3.0, 6.0, 0.0, 9.0])).values.tolist() == [4.5, 3.0, 5.0, 4.5]  # window: one on either side


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 9.3, ["0", "2", "4", "6", "8", "10"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 0.001, ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
        (14.2, 30.1, ["10", "15", "20", "25", "30", "35"]),
        (-0.3, 0.7, ["-0.4", "-0.2", "0", "0.2", "0.4", "0.6", "0.8"]),
        (0, 31_000, ["0", "10k", "20k", "30k", "40k"]),
        (0, 2_400_000, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
        (5, 5, ["4.4", "4.6", "4.8", "5.0", "5.2", "5.4", "5.6"]),
    ],
)
def test_axes_have_round_ticks_around_the_values(low: float, high: float, labels: list[str]) -> None:
    axis = linear_axis(low, high)
    assert [axis.label(tick) for tick in axis.ticks] == labels
    assert axis.low <= low <= high <= axis.high


def test_logarithmic_axis_puts_equal_factors_at_equal_distances() -> None:
    axis = log_axis(0.5, 800)
    assert [axis.label(tick) for tick in axis.ticks] == ["1", "10", "100", "1000"]
    assert axis.position(100) - axis.position(10) == pytest.approx(axis.position(10) - axis.position(1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123456, "0.1235"),
        (12.0, "12"),
        (3141.59, "3142"),
        (31415.9, "31.42k"),
        (1.5e9, "1.5G"),
        (-0.00025, "-2.5e-4"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_are_written_with_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_counts_bytes_and_times_are_written_for_people() -> None:
    assert [count(1234567), memory(1536), memory(3 * 2**30)] == ["1\u202f234\u202f567", "1.5 KiB", "3 GiB"]
    assert [duration(4.21), duration(185), duration(7500), duration(200_000)] == ["4.2 s", "3 min 05 s", "2 h 05 min", "2 d 07 h"]
