"""Figures of a space, against hand calculation, numpy and scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lookup_model import Sample, make_model, write_shards
from scipy.spatial.distance import pdist
from sklearn.neighbors import KNeighborsClassifier

from clipscale.errors import DataError
from clipscale.evaluators import _scoring
from clipscale.evaluators._scoring import leave_one_out_votes
from clipscale.evaluators.representation import Representation, effective_rank, modality_gap, uniformity
from clipscale.parallel.mesh import Mesh


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def test_uniformity_is_over_pairs_of_different_rows() -> None:
    x = unit(40, 5, 0)
    expected = math.log(np.exp(-2 * pdist(x.numpy(), "sqeuclidean")).mean())
    assert uniformity(x)(np.ones(40)) == pytest.approx(expected)
    weights = np.array([2.0, 1.0, 1.0] + [0.0] * 37)  # the first row twice: pairs with itself do not count
    near = np.exp(
        -2 * np.array([float((x[0] - x[1]).square().sum()), float((x[0] - x[2]).square().sum()), float((x[1] - x[2]).square().sum())])
    )
    assert uniformity(x)(weights) == pytest.approx(math.log((2 * near[0] + 2 * near[1] + near[2]) / 5))


def test_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    x = unit(30, 6, 1)
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(x, np.ones(30)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(torch.eye(4, dtype=torch.float64), np.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.eye(4, dtype=torch.float64), np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)


def test_the_gap_is_between_the_means() -> None:
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert modality_gap(x, y, np.ones(2)) == pytest.approx(math.sqrt(0.5))
    assert modality_gap(x, y, np.array([1.0, 0.0])) == pytest.approx(0)


def test_votes_equal_those_of_scikit_learn_with_each_row_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = unit(60, 4, 2), np.random.default_rng(0).integers(0, 3, 60)
    monkeypatch.setattr(_scoring, "CHUNK_ELEMENTS", 60 * 7)
    found = leave_one_out_votes(x, torch.from_numpy(labels), torch.arange(60), k=5)
    for row in range(60):
        others = np.arange(60) != row
        model = KNeighborsClassifier(5, metric="euclidean", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        assert model.fit(x.numpy()[others], labels[others]).predict(x.numpy()[row : row + 1])[0] == found[row]


def test_rows_of_ones_own_cluster_do_not_vote() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    assert leave_one_out_votes(x, labels, torch.tensor([0, 1, 2]), k=1).tolist() == [0, 0, 0]
    assert leave_one_out_votes(x, labels, torch.tensor([0, 0, 2]), k=1).tolist() == [1, 1, 0]


def test_the_whole_of_it_on_vectors_set_by_hand(tmp_path: Path) -> None:
    samples = [Sample(["a cat" if row % 2 else "a dog"], image=row, record={"label": row % 2}) for row in range(4)]
    model = make_model(images=[[0.0, 1], [1.0, 0], [0.0, 1], [1.0, 0]], texts={"a cat": [1.0, 0.0], "a dog": [0.6, 0.8]})
    source = {"name": "shards", "url": write_shards(tmp_path, samples)}
    result = Representation.model_validate({"source": source, "field": "label", "neighbours": 1}).evaluate(model, Mesh.single())
    assert (result.figures[0].name, result.figures[0].hits, result.figures[0].n) == ("neighbours_top1", 4, 4)
    assert result.figure("alignment").value == pytest.approx((0.4 * 2) / 4)  # dogs: 0.6² + 0.2²; cats: 0
    assert result.figure("modality_gap").value == pytest.approx(math.hypot(0.3, 0.1))
    assert result.figure("image_effective_rank").value == pytest.approx(2)
    assert result.figure("image_uniformity").value == pytest.approx(math.log((2 + 4 * math.exp(-4)) / 6))
    assert [item.correct for item in result.examples[0].results] == [True, False, False]


def test_neighbours_within_one_cluster_alone_are_refused(tmp_path: Path) -> None:
    samples = [Sample(["a cat"], image=row, record={"label": row, "speaker": "one"}) for row in range(2)]
    source = {"name": "shards", "url": write_shards(tmp_path, samples)}
    model = make_model(images=[[1.0, 0], [0, 1.0]], texts={"a cat": [1.0, 0]})
    with pytest.raises(DataError, match="all 2 samples have one 'speaker'"):
        Representation.model_validate({"source": source, "field": "label"}).evaluate(model, Mesh.single())
