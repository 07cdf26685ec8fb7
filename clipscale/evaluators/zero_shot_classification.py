"""Zero-shot classification: which class's prompts does a picture or a recording lie closest to?

Radford et al. 2021, arXiv:2103.00020, §3.1: every class is put into templates, the prompts' embeddings are normalised,
averaged and normalised again, and a row belongs to the class with the largest cosine. Of equal cosines the class that
comes first in the list wins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clipscale.data.sources import Source
from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, Evaluator, Example, Figure, Item
from clipscale.evaluators._embed import Rows, embed_prompts, embed_rows
from clipscale.evaluators._prompts import Templates, duplicate_words, fill, in_order
from clipscale.evaluators._scoring import Classified, classify, expected_calibration_error, hits_at, mean_per_class, nearest
from clipscale.evaluators._sources import check_source
from clipscale.evaluators._summary import Clusters, confusion, example_rows, group_hits, mean, provenance, share, statistic, with_rows
from clipscale.inputs import Modality
from clipscale.towers._open_clip_prompts import ClassList, imagenet_ids, open_clip_classes

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh


class ZeroShotClassification(Evaluator):
    """Top-1, top-5 and per-class accuracy of a classifier made of words."""

    source: Source
    """The data set; every record holds the class."""
    modality: Literal["image", "speech"] = "image"
    field: str = "label"
    """The record field that holds the class."""
    classes: ClassList | Annotated[list[str], Field(min_length=2)] | Annotated[dict[str | int, str], Field(min_length=2)] | None = None
    """Every class a row may be taken for: a list of labels that are their own words, or words by label. None: the labels found.
    `imagenet` (also for V2 and Sketch), `imagenet_a` or `imagenet_r`: open_clip's words; labels are WordNet ids, or numbers of the 1000."""
    templates: Templates = ["a photo of a {}."]
    """What is said of a class: a list with `{}` for its words, or `openai_imagenet` (80) or `simple_imagenet` (7)."""
    cluster: str | None = "speaker"
    """Rows that share this record field are not independent, and the interval says so; ignored where no record has it."""
    batch_size: int = Field(default=256, gt=0)

    def modalities(self) -> set[Modality]:
        return {self.modality, "text"}

    def check(self) -> None:
        check_source(self.source, self.modality)

    def evaluate(self, model: Encoders, mesh: Mesh) -> Evaluation:
        rows = embed_rows(model, mesh, self.source, self.modality, batch_size=self.batch_size)
        labels = self._labels(rows)
        classes = self._words(labels)
        truth = _places(rows, labels, list(classes), self.field)
        prompts = [fill(self.templates, words) for words in classes.values()]
        classifier = embed_prompts(model, mesh, prompts, batch_size=self.batch_size)
        scored = classify(rows.embeddings, classifier, truth.to(mesh.device), scale=_scale(model, self.modality))
        clusters = Clusters.by_field(rows, self.cluster)
        hits = hits_at(scored.rank, 1)
        shown = {label: words if words == label else f"{words} ({label})" for label, words in classes.items()}
        names = list(shown.values())
        groups = {"class": group_hits(labels, hits, list(classes))}
        if clusters.by != "row":
            groups[clusters.by] = group_hits(clusters.of_row, hits)
        return Evaluation(
            name="zero_shot_classification",
            kind="zero_shot_classification",
            figures=with_rows(
                self._figures(scored, truth, clusters, len(classes)),
                keys=rows.keys,
                truths=[shown[label] for label in labels],
                answers=[names[place] for place in scored.predicted.tolist()],
                modality=self.modality,
                source=rows.source,
            ),
            confusion=confusion(self.field, list(classes), truth.numpy(), scored.predicted.cpu().numpy()),
            groups=groups,
            examples=_examples(rows, self.modality, classifier, list(classes.values()), truth),
            warnings=_warnings(classes, labels),
            provenance=provenance(self, [rows], prompts),
        )

    def _labels(self, rows: Rows) -> list[str]:
        """Every row's class; of ImageNet as WordNet id, for ImageNet-V2 names its folders 0 to 999."""
        labels = rows.field(self.field)
        if not isinstance(self.classes, str):
            return labels
        ids = imagenet_ids()
        return [ids[int(label)] if label.isdecimal() and int(label) < len(ids) else label for label in labels]

    def _words(self, labels: list[str]) -> dict[str, str]:
        """Words by label, in the order of the classifier's columns."""
        if isinstance(self.classes, str):
            return open_clip_classes(self.classes)
        if isinstance(self.classes, dict):
            return {str(label): words for label, words in self.classes.items()}
        return {label: label for label in self.classes or in_order(labels)}

    def _figures(self, scored: Classified, truth: Tensor, clusters: Clusters, num_classes: int) -> list[Figure]:
        hits, true = hits_at(scored.rank, 1), truth.numpy()
        figures = [share("top1", hits, clusters, chance=1 / num_classes)]
        if num_classes > 5:
            figures.append(share("top5", hits_at(scored.rank, 5), clusters, chance=5 / num_classes))
        figures.append(statistic("mean_per_class", lambda weights: mean_per_class(true, hits, weights), len(true), clusters))
        return figures if scored.confidence is None else [*figures, *_calibration(scored.confidence, hits, clusters)]


def _scale(model: Encoders, modality: Modality) -> float | None:
    """The temperature that the model was trained with on this modality and text; None where there is none, or several."""
    scales = [model.log_scale[kind] for kind, made in model.pair_kinds.items() if set(made.modalities) == {modality, "text"}]
    return scales[0].exp().item() if len(scales) == 1 else None


def _calibration(confidence: Tensor, hits: NDArray[np.int64], clusters: Clusters) -> list[Figure]:
    """What the model believes of its answers, and how far that lies from the truth.

    Resampling noise can only add to a calibration error, so its interval is drawn down to the value where it lies above.
    """
    believed = confidence.cpu().numpy().astype(np.float64)
    error = statistic("calibration_error", lambda weights: expected_calibration_error(believed, hits, weights), len(hits), clusters)
    return [mean("confidence", believed, clusters), replace(error, low=min(error.low, error.value), high=max(error.high, error.value))]


def _places(rows: Rows, labels: list[str], classes: list[str], field: str) -> Tensor:
    """The place of every label among the classes: int64 [N]."""
    place = {label: index for index, label in enumerate(classes)}
    unknown = in_order([label for label in labels if label not in place])
    if unknown:
        raise DataError(f"{rows.source}: values of '{field}' that are not among the {len(classes)} classes: {', '.join(unknown[:5])}")
    return torch.tensor([place[label] for label in labels])


def _warnings(classes: dict[str, str], labels: list[str]) -> list[str]:
    twice = duplicate_words(list(classes.values()))
    warnings = [f"several classes are called '{words}'; the first one gets all their rows" for words in twice]
    present = set(labels)
    absent = [label for label in classes if label not in present]
    return warnings + ([f"{len(absent)} of {len(classes)} classes have no row: {', '.join(absent[:5])}"] if absent else [])


def _examples(rows: Rows, modality: Modality, classifier: Tensor, words: list[str], truth: Tensor) -> list[Example]:
    chosen = example_rows(rows.keys)
    scores, places = nearest(rows.embeddings[chosen], classifier, 3)
    return [
        Example(
            Item(modality, rows.keys[row], rows.source, words[int(truth[row])]),
            [Item("text", "", "", words[place], score, place == int(truth[row])) for score, place in zip(*best, strict=True)],
        )
        for row, best in zip(chosen, zip(scores.tolist(), places.tolist(), strict=True), strict=True)
    ]
