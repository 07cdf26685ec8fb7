"""Zero-shot classification's arithmetic against scikit-learn, hand counts and written-out loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score

from clipscale.evaluators import _scoring
from clipscale.evaluators._scoring import classify, confusion_counts, hits_at, macro_f1, mean_per_class


def _random_rows(seed: int, *, rows: int = 300, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(rows, 16, generator=generator, dtype=torch.float64), dim=1)
    classifier = torch.nn.functional.normalize(torch.randn(classes, 16, generator=generator, dtype=torch.float64), dim=1)
    return embeddings, classifier, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learn(k: int) -> None:
    rows, classifier, truth = _random_rows(0)
    expected = top_k_accuracy_score(truth.numpy(), (rows @ classifier.T).numpy(), k=k, labels=range(7), normalize=False)
    assert hits_at(classify(rows, classifier, truth).rank, k).sum() == expected


def test_chunks_change_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classifier, truth = _random_rows(1)
    whole = classify(rows, classifier, truth)
    monkeypatch.setattr(_scoring, "CHUNK_ELEMENTS", 7 * 11)
    chunked = classify(rows, classifier, truth)
    assert torch.equal(whole.rank, chunked.rank)
    assert torch.equal(whole.predicted, chunked.predicted)


def test_the_first_of_two_equal_classes_wins_as_in_argmax() -> None:
    classifier = torch.eye(3)[[0, 1, 1, 2]]  # classes 1 and 2 have the same prompt
    rows = torch.eye(3)[[1, 1, 2, 0]]
    result = classify(rows, classifier, torch.tensor([1, 2, 2, 0]))
    assert result.predicted.tolist() == [1, 1, 3, 0]
    assert result.rank.tolist() == [1, 2, 4, 1]  # row 2: class 3 scores 1; classes 0, 1 and 2 tie at 0, in that order


def test_a_row_in_first_place_is_exactly_a_row_predicted_right() -> None:
    rows, classifier, truth = _random_rows(2)
    classifier[5] = classifier[3]
    result = classify(rows, classifier, truth)
    assert torch.equal(result.rank == 1, result.predicted == truth)


def test_confusion_and_macro_f1_and_class_mean_equal_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    truth, answer = generator.integers(0, 6, 200), generator.integers(1, 8, 200)  # class 0 never answered, class 7 never true
    assert np.array_equal(confusion_counts(truth, answer, 8), confusion_matrix(truth, answer, labels=range(8)))
    assert macro_f1(truth, answer) == pytest.approx(f1_score(truth, answer, average="macro"), abs=1e-12)
    seen = np.isin(answer, truth)
    hits = (truth == answer).astype(np.int64)
    assert mean_per_class(truth[seen], hits[seen]) == pytest.approx(balanced_accuracy_score(truth[seen], answer[seen]), abs=1e-12)


def test_weights_count_rows_as_often_as_they_say() -> None:
    generator = np.random.default_rng(4)
    truth, answer, times = generator.integers(0, 4, 50), generator.integers(0, 4, 50), generator.integers(0, 3, 50)
    repeated_truth, repeated_answer = np.repeat(truth, times), np.repeat(answer, times)
    assert macro_f1(truth, answer, times.astype(float)) == pytest.approx(
        f1_score(repeated_truth, repeated_answer, average="macro"), abs=1e-12
    )
    hits = (truth == answer).astype(np.int64)
    expected = balanced_accuracy_score(repeated_truth, repeated_answer)
    assert mean_per_class(truth, hits, times.astype(float)) == pytest.approx(expected, abs=1e-12)
