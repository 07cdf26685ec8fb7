"""Zero-shot classification as open_clip does it: its own functions on the same pictures, ImageNet's names, and calibration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from foreign_models import add_architecture, open_clip_model
from lookup_model import Sample, make_model, write_shards
from tiny import COLOURS, write_squares

from clipscale.data.images import decode_image
from clipscale.data.shards import open_dataset
from clipscale.errors import DataError
from clipscale.evaluators._scoring import expected_calibration_error
from clipscale.evaluators.zero_shot_classification import ZeroShotClassification
from clipscale.foreign import open_foreign
from clipscale.model import PairKindModel
from clipscale.parallel.mesh import Mesh
from clipscale.towers._open_clip_prompts import open_clip_classes

TEXTS = {"a cat": [1.0, 0.0], "a dog": [0.0, 1.0]}


def test_counts_equal_those_of_open_clips_own_zero_shot_functions(tmp_path: Path) -> None:
    name = add_architecture(tmp_path / "architectures", "zero-shot-clip")
    model = open_clip_model(name, seed=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    names = [*COLOURS, "tench", "hen", "a very dark violet"]
    squares = write_squares(tmp_path, samples=60)
    settings = {"source": {"name": "shards", "url": str(squares)}, "classes": names, "templates": "simple_imagenet", "batch_size": 7}
    opened = open_foreign(tmp_path / "model.pt", architecture=name).model
    result = ZeroShotClassification.model_validate(settings).evaluate(opened, Mesh.single())

    templates, tokenizer = open_clip.SIMPLE_IMAGENET_TEMPLATES, open_clip.get_tokenizer(name)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, num_classes_per_batch=None)
    index = open_dataset(str(squares))
    samples = [sample for shard, size in enumerate(index.samples) for sample in index.read(shard, range(size))]
    preprocess = open_clip.get_model_preprocess_cfg(model)
    spec = opened.inputs()["image"]
    pixels = torch.stack([decode_image(sample.image, spec) for sample in samples]) / 255  # type: ignore[union-attr,arg-type]
    mean, std = (torch.tensor(preprocess[part])[:, None, None] for part in ("mean", "std"))
    with torch.no_grad():
        logits = 100 * torch.nn.functional.normalize(model.encode_image((pixels - mean) / std), dim=-1) @ classifier
    truth = torch.tensor([names.index(sample.record["label"]) for sample in samples])  # type: ignore[union-attr]
    top = logits.topk(5, dim=1).indices == truth[:, None]
    assert result.figure("top1").hits == int(top[:, 0].sum())
    assert result.figure("top5").hits == int(top.any(1).sum())
    probability = (logits / 100 / 0.07).softmax(1).amax(1)  # the model's own scale, not 100
    assert result.figure("confidence").value == pytest.approx(probability.mean().item(), abs=1e-5)


def test_imagenets_words_stand_in_the_order_of_its_ids_and_the_subsets_are_theirs() -> None:
    whole, a, r = (open_clip_classes(name) for name in ("imagenet", "imagenet_a", "imagenet_r"))
    assert (len(whole), len(a), len(r), len(a.keys() & r.keys())) == (
        1000,
        200,
        200,
        86,
    )  # 86: reference/eval.md, counted from the papers' lists
    assert list(whole) == sorted(whole)
    assert (whole["n01440764"], whole["n07753592"], a["n07753592"]) == ("tench", "banana", "banana")
    assert list(whole.values()).count("missile") == 2


@pytest.mark.parametrize("labels", [["n01440764", "n07753592"], [0, 954], ["0", "954"]])
def test_labels_are_wordnet_ids_or_numbers_as_in_imagenet_v2(tmp_path: Path, labels: list[str | int]) -> None:
    url = write_shards(tmp_path, [Sample(["x"], image=row, record={"label": label}) for row, label in enumerate(labels)])
    texts = {f"a {words}": [0.6, 0.8] if number else [-1.0, 0.1] for number, words in enumerate(open_clip_classes("imagenet").values())}
    texts |= {"a tench": [1.0, 0.0], "a banana": [0.0, 1.0]}
    asked = {"source": {"name": "shards", "url": url}, "classes": "imagenet", "templates": ["a {}"]}
    result = ZeroShotClassification.model_validate(asked).evaluate(make_model(images=[[1.0, 0], [0, 1.0]], texts=texts), Mesh.single())
    assert (result.figure("top1").hits, result.figure("top1").chance) == (2, 1 / 1000)
    assert "several classes are called 'missile'; the first one gets all their rows" in result.warnings
    assert "several classes are called 'sunglasses'; the first one gets all their rows" in result.warnings


def test_a_class_that_the_subset_lacks_is_refused(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [Sample(["x"], image=0, record={"label": "n01440764"})])  # tench: not in A
    asked = {"source": {"name": "shards", "url": url}, "classes": "imagenet_a", "templates": ["a {}"]}
    with pytest.raises(DataError, match="not among the 200 classes: n01440764"):
        ZeroShotClassification.model_validate(asked).evaluate(make_model(images=[[1.0, 0]], texts=TEXTS), Mesh.single())


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    confidence, hits = np.array([0.95, 0.97, 0.5, 0.52, 1.0]), np.array([1, 0, 1, 0, 1])
    # bins of 1/15: 0.95, 0.97 and 1.0 in the last, 0.5 and 0.52 in the eighth
    expected = (abs(0.95 + 0.97 + 1.0 - 2) + abs(0.5 + 0.52 - 1)) / 5
    assert expected_calibration_error(confidence, hits) == pytest.approx(expected)
    twice = expected_calibration_error(confidence, hits, np.array([2.0, 1, 1, 1, 0]))
    assert twice == pytest.approx((abs(2 * 0.95 + 0.97 - 2) + abs(0.5 + 0.52 - 1)) / 5)


def test_confidence_is_that_of_the_models_own_scale(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [Sample([word], image=row, record={"label": word}) for row, word in enumerate(["cat", "dog"])])
    model = make_model(images=[[1.0, 0], [0.0, 1]], texts={"a cat": [1.0, 0], "a dog": [0.0, 1]})
    model.pair_kinds["image_text"] = PairKindModel(("image", "text"))
    model.log_scale["image_text"] = torch.nn.Parameter(torch.tensor([math.log(3.0)]))
    asked = {"source": {"name": "shards", "url": url}, "templates": ["a {}"]}
    result = ZeroShotClassification.model_validate(asked).evaluate(model, Mesh.single())
    probability = math.exp(3) / (math.exp(3) + 1)
    assert result.figure("confidence").value == pytest.approx(probability)
    assert result.figure("calibration_error").value == pytest.approx(1 - probability)
