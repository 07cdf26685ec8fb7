"""Zero-shot classification: which class's prompts does a picture or a recording lie closest to?

Radford et al. 2021, arXiv:2103.00020, §3.1: every class is put into templates, the prompts' embeddings are normalised,
averaged and normalised again, and a row belongs to the class with the largest cosine. Of equal cosines the class that
comes first in the list wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from clipscale.data.sources import Source
from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, Evaluator, Example, Figure, Item
from clipscale.evaluators._embed import Rows, embed_prompts, embed_rows
from clipscale.evaluators._prompts import Templates, duplicate_words, fill, in_order
from clipscale.evaluators._scoring import Classified, classify, hits_at, mean_per_class, nearest
from clipscale.evaluators._sources import check_source
from clipscale.evaluators._summary import Clusters, confusion, example_rows, group_hits, provenance, share, statistic
from clipscale.inputs import Modality

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
    classes: list[str] | dict[str | int, str] | None = Field(default=None, min_length=2)
    """Every class a row may be taken for: a list of labels that are their own words, or words by label. None: the labels found."""
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
        labels = rows.field(self.field)
        classes = self._words(labels)
        truth = _places(rows, labels, list(classes), self.field)
        prompts = [fill(self.templates, words) for words in classes.values()]
        classifier = embed_prompts(model, mesh, prompts, batch_size=self.batch_size)
        scored = classify(rows.embeddings, classifier, truth.to(mesh.device))
        clusters = Clusters.by_field(rows, self.cluster)
        hits = hits_at(scored.rank, 1)
        groups = {"class": group_hits(labels, hits, list(classes))}
        if clusters.by != "row":
            groups[clusters.by] = group_hits(clusters.of_row, hits)
        return Evaluation(
            name="zero_shot_classification",
            kind="zero_shot_classification",
            figures=self._figures(scored, truth, clusters, len(classes)),
            confusion=confusion(self.field, list(classes), truth.numpy(), scored.predicted.cpu().numpy()),
            groups=groups,
            examples=_examples(rows, self.modality, classifier, list(classes.values()), truth),
            warnings=_warnings(classes, labels),
            provenance=provenance(self, [rows], prompts),
        )

    def _words(self, labels: list[str]) -> dict[str, str]:
        """Words by label, in the order of the classifier's columns."""
        if isinstance(self.classes, dict):
            return {str(label): words for label, words in self.classes.items()}
        return {label: label for label in self.classes or in_order(labels)}

    def _figures(self, scored: Classified, truth: Tensor, clusters: Clusters, num_classes: int) -> list[Figure]:
        hits, true = hits_at(scored.rank, 1), truth.numpy()
        figures = [share("top1", hits, clusters, chance=1 / num_classes)]
        if num_classes > 5:
            figures.append(share("top5", hits_at(scored.rank, 5), clusters, chance=5 / num_classes))
        return [*figures, statistic("mean_per_class", lambda weights: mean_per_class(true, hits, weights), len(true), clusters)]


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
