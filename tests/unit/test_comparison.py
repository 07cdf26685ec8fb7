"""Two evaluations compared row by row: statistics against scipy and hand calculation, the whole of it on vectors set by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_tree import Page
from lookup_model import Sample, make_model, write_shards
from scipy.stats import binomtest, norm
from typer.testing import CliRunner

from clipscale.cli import app
from clipscale.comparison import compare, dropped, write
from clipscale.errors import RequestError
from clipscale.evaluate import write as write_evaluation
from clipscale.evaluators.retrieval import Retrieval
from clipscale.evaluators.zero_shot_classification import ZeroShotClassification
from clipscale.intervals import mcnemar, paired_bootstrap
from clipscale.parallel.mesh import Mesh

LABELS = ["cat", "dog"]
TEXTS = {"a cat": [1.0, 0.0], "a dog": [0.0, 1.0]}


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 2), (2, 7), (60, 40), (5, 5), (900, 1000)])
def test_mcnemars_p_is_that_of_a_fair_coin(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_a_paired_interval_is_the_normal_one_for_many_independent_rows() -> None:
    differences = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=4000, p=[0.1, 0.7, 0.2])
    found = paired_bootstrap(differences, range(4000), by="row")
    half = norm.ppf(0.975) * differences.std() / np.sqrt(4000)
    assert found.method == "paired bootstrap"
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.1 * half)  # 2,000 draws


def test_rows_of_one_cluster_count_once() -> None:
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=200)
    once = paired_bootstrap(differences, range(200), by="row")
    twice = paired_bootstrap(np.repeat(differences, 2), np.repeat(np.arange(200), 2).tolist(), by="speaker")
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert twice.method == "paired cluster bootstrap by speaker"


def test_no_row_that_differs_is_no_proof_that_none_would() -> None:
    found = paired_bootstrap(np.zeros(50), range(50), by="row")
    bound = norm.ppf(0.975) ** 2 / (50 + norm.ppf(0.975) ** 2)  # Wilson's upper end for 0 of 50
    assert (found.low, found.high) == pytest.approx((-bound, bound))


# --- whole comparisons ------------------------------------------------------------------------------------------------


def evaluated(folder: Path, data: Path, right: Sequence[bool], **settings: Any) -> Path:
    """An evaluation in which exactly these rows are right."""
    labels = [LABELS[number % 2] for number in range(len(right))]
    if not data.exists():
        samples = [Sample([f"a {label}"], image=number, record={"label": label}) for number, label in enumerate(labels)]
        write_shards(data, samples)
    images = [TEXTS[f"a {LABELS[(number + (not is_right)) % 2]}"] for number, is_right in enumerate(right)]
    evaluator = ZeroShotClassification.model_validate({"source": {"name": "shards", "url": str(data)}, "templates": ["a {}"], **settings})
    result = evaluator.evaluate(make_model(images=images, texts=TEXTS), Mesh.single())
    write_evaluation(folder, {"animals": result})
    return folder


def pattern(*counts: tuple[int, bool]) -> list[bool]:
    return [value for number, value in counts for _ in range(number)]


def test_wins_losses_and_flips_are_those_of_the_rows(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", pattern((10, True), (6, False), (2, True), (2, False)))
    b = evaluated(tmp_path / "b", tmp_path / "data", pattern((10, True), (6, True), (2, False), (2, False)))
    found = compare(a, b)
    top1 = found.changes[0]
    assert (top1.figure, top1.headline, top1.n, top1.wins, top1.losses) == ("top1", True, 20, 6, 2)
    assert top1.difference == pytest.approx(4 / 20)
    assert top1.p == pytest.approx(binomtest(6, 8).pvalue)
    assert top1.low is not None
    assert top1.high is not None
    assert top1.low < 4 / 20 < top1.high
    assert [flip.key for flip in found.flips] == [f"s{number:03d}" for number in range(10, 18)]
    assert (found.flips[0].truth, found.flips[0].answer_a, found.flips[0].answer_b, found.flips[0].won) == ("cat", "dog", "cat", True)
    per_class = next(change for change in found.changes if change.figure == "mean_per_class")
    assert (per_class.low, per_class.p) == (None, None)  # no mean of rows: nothing is claimed


def test_captions_of_one_picture_are_drawn_together_and_not_put_to_mcnemar(tmp_path: Path) -> None:
    url = write_shards(tmp_path / "data", [Sample(list(TEXTS)[row : row + 1] * 2, image=row) for row in range(2)])
    asked = {"queries": {"modality": "image", "source": {"name": "shards", "url": url}}, "gallery": {"modality": "text"}}
    for name, images in (("a", [[1.0, 0.0], [0.0, 1.0]]), ("b", [[0.0, 1.0], [1.0, 0.0]])):
        result = Retrieval.model_validate(asked).evaluate(make_model(images=images, texts=TEXTS), Mesh.single())
        write_evaluation(tmp_path / name, {"pairs": result})
    changes = {change.figure: change for change in compare(tmp_path / "a", tmp_path / "b").changes}
    back = changes["text_to_image_R@1"]
    assert (back.n, back.losses, back.p, back.interval) == (4, 4, None, "wilson over 2 samples")
    assert changes["image_to_text_R@1"].p == pytest.approx(0.5)  # two rows, both lost
    assert changes["image_to_text_MRR"].wins is None


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 6)
    b = evaluated(tmp_path / "b", tmp_path / "others", [True] * 8)
    with pytest.raises(RequestError, match="'animals' is not the same evaluation on both sides"):
        compare(a, b)


def test_evaluations_of_one_side_alone_and_other_settings_are_told(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 6)
    b = evaluated(tmp_path / "b", tmp_path / "data", [True] * 6, batch_size=3)
    assert compare(a, b).remarks == ["animals: settings differ, not the checkpoint alone"]
    renamed = json.loads((b / "evaluation.json").read_text())
    (b / "evaluation.json").write_text(json.dumps({"beasts": renamed["animals"]}))
    with pytest.raises(RequestError, match="no evaluation has the same name in both"):
        compare(a, b)


def test_an_evaluation_without_its_rows_is_refused(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 6)
    (a / "outcomes.parquet").unlink()
    with pytest.raises(RequestError, match=r"outcomes.parquet.*evaluate again"):
        compare(a, a)


@pytest.mark.parametrize(
    ("lost", "at_most", "certainly", "fails"),
    [
        (0, 0.0, False, False),
        (30, 0.1, False, True),
        (30, 0.25, False, False),
        (2, 0.0, False, False),
        (2, 0.0, True, True),
        (2, 0.2, True, False),
    ],
)
def test_a_gate_asks_for_proof_of_a_drop_or_of_none(tmp_path: Path, lost: int, at_most: float, certainly: bool, fails: bool) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 100)
    b = evaluated(tmp_path / "b", tmp_path / "data", pattern((lost, False), (100 - lost, True)))
    assert bool(dropped(compare(a, b), at_most=at_most, certainly=certainly)) is fails


def test_the_command_prints_writes_and_ends_as_the_gate_says(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 20)
    b = evaluated(tmp_path / "b", tmp_path / "data", pattern((12, False), (8, True)))
    command = ["eval", "compare", str(a), str(b)]
    passed = CliRunner().invoke(app, command)
    assert passed.exit_code == 0
    assert "0 / 12" in passed.stdout
    failed = CliRunner().invoke(app, [*command, "--max-drop", "0.01", "--output", str(tmp_path / "out")])
    assert failed.exit_code == 1
    assert "animals (top1) by 0.6000" in failed.stderr
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["changes"][0]["losses"] == 12


def test_the_page_shows_what_flipped_with_its_picture(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", tmp_path / "data", [True] * 20)
    b = evaluated(tmp_path / "b", tmp_path / "data", pattern((15, False), (5, True)))
    page = write(compare(a, b), tmp_path / "out").read_text()
    tree = Page(page).root
    assert page.count("<img ") == 12  # of the 15 rows lost
    assert "15 rows, 12 of them shown" in tree.text
    assert "A alone has them right" in tree.text
    assert "B alone has them right" not in tree.text
