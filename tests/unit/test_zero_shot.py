"""Zero-shot classification: its arithmetic against scikit-learn, the whole of it on vectors that are set by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lookup_model import Sample, make_model, write_shards
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score

from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, _scoring
from clipscale.evaluators._prompts import fill, in_order, normalise_caption
from clipscale.evaluators._scoring import classify, confusion_counts, hits_at, macro_f1, mean_per_class
from clipscale.evaluators.zero_shot_classification import ZeroShotClassification
from clipscale.parallel.mesh import Mesh


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


# --- the whole evaluator, on hand-made vectors ---------------------------------------------------------------------

IMAGES = [[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1], [0.8, 0.6, 0]]
TEXTS = {
    "a cat": [1.0, 0, 0],
    "a photo of cat": [0.6, 0.8, 0],  # alone it would take row 3, whose cosines are 0.96 with it and 0.8 with "a cat"
    "a dog": [0.0, 1, 0],
    "a photo of dog": [0.0, 1, 0],
    "a fish": [0.0, 0, 1],
    "a photo of fish": [0.0, 0, 1],
}
ROWS = [("cat", 0), ("cat", 3), ("dog", 1), ("dog", 2), ("fish", 2)]


def _evaluate(folder: Path, texts: dict[str, list[float]] = TEXTS, **settings: object) -> Evaluation:
    url = write_shards(folder, [Sample([label], image=row, record={"label": label}) for label, row in ROWS])
    evaluator = ZeroShotClassification.model_validate({"source": {"name": "shards", "url": url}, **settings})
    return evaluator.evaluate(make_model(images=IMAGES, texts=texts), Mesh.single())


def test_rows_go_to_the_class_whose_prompts_lie_closest(tmp_path: Path) -> None:
    result = _evaluate(tmp_path, templates=["a {}"])
    assert (result.figure("top1").hits, result.figure("top1").n, result.figure("top1").interval) == (4, 5, "wilson")
    assert result.figure("top1").chance == pytest.approx(1 / 3)
    assert result.figure("mean_per_class").value == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert result.confusion is not None
    assert (result.confusion.classes, result.confusion.counts) == (["cat", "dog", "fish"], [[2, 0, 0], [0, 1, 1], [0, 0, 1]])
    assert [(group.name, group.hits, group.n) for group in result.groups["class"]] == [("cat", 2, 2), ("dog", 1, 2), ("fish", 1, 1)]


def test_prompts_are_averaged_after_each_is_normalised(tmp_path: Path) -> None:
    texts = {**TEXTS, "a photo of cat": [6.0, 8.0, 0]}  # ten times as long: the average of raw vectors would point elsewhere
    result = _evaluate(tmp_path, texts, templates=["a {}", "a photo of {}"])
    cosines = {result_.text: result_.score for example in result.examples if example.query.key == "s000" for result_ in example.results}
    prototype = (1.6, 0.8)
    assert cosines["cat"] == pytest.approx(prototype[0] / math.hypot(*prototype), abs=1e-6)


def test_classes_given_as_words_by_label_are_ranked_even_without_rows(tmp_path: Path) -> None:
    texts = {"a tabby": [1.0, 0, 0], "a hound": [0.0, 1, 0], "a trout": [0.0, 0, 1], "a yak": [0.79, 0.61, 0]}
    words = {"cat": "tabby", "dog": "hound", "fish": "trout", "yak": "yak"}
    result = _evaluate(tmp_path, texts, templates=["a {}"], classes=words)
    assert result.figure("top1").hits == 3  # row 1 now goes to the yak
    assert result.warnings == ["1 of 4 classes have no row: yak"]
    assert result.confusion is not None
    assert result.confusion.counts[0] == [1, 0, 0, 1]


def test_classes_of_the_same_name_are_pointed_out(tmp_path: Path) -> None:
    texts = {**TEXTS, "a Cat": [1.0, 0, 0]}
    result = _evaluate(tmp_path, texts, templates=["a {}"], classes={"cat": "cat", "dog": "dog", "fish": "Cat"})
    assert result.warnings == ["several classes are called 'cat'; the first one gets all their rows"]


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"values of 'label' that are not among the 2 classes: fish"):
        _evaluate(tmp_path, classes=["cat", "dog"])


def test_a_template_without_a_place_for_the_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"template 'a photo' needs one pair of braces"):
        _evaluate(tmp_path, templates=["a photo"])


def test_open_clips_lists_are_known_by_name() -> None:
    assert len(fill("openai_imagenet", "x")) == 80
    assert "a photo of the large trout." in fill("simple_imagenet", "trout")


def test_the_same_text_is_the_same_whatever_case_spacing_and_punctuation() -> None:
    assert normalise_caption("  Turn on, the\tLIGHTS! ") == normalise_caption("turn on the lights")
    assert normalise_caption("don’t") == normalise_caption("don't") != normalise_caption("dont")
    assert normalise_caption("रोशनी।") == "रोशनी"  # vowel signs are no punctuation, the danda is


def test_numbers_are_sorted_as_numbers() -> None:
    assert in_order(["10", "9", "9", "0"]) == ["0", "9", "10"]
    assert in_order(["10", "9", "a"]) == ["10", "9", "a"]
