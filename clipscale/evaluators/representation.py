"""Representation: how a model's space is used, whatever it is asked: the gap between modalities, spread, rank, and neighbours of one class.

Modality gap: Liang et al. 2022, arXiv:2203.02053. Alignment and uniformity: Wang and Isola 2020, arXiv:2005.10242. Effective rank:
Roy and Vetterli 2007, as in RankMe (Garrido et al. 2023, arXiv:2210.02885). Neighbours: Wu et al. 2018, arXiv:1805.01978, each row left
out in turn.

N samples, D embedding width; x are the medium's embeddings, y those of each sample's first caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clipscale.data.sources import Source
from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, Evaluator, Example, Figure, Item
from clipscale.evaluators._embed import Rows, embed_rows, embed_texts
from clipscale.evaluators._prompts import in_order
from clipscale.evaluators._scoring import leave_one_out_votes, nearest
from clipscale.evaluators._sources import check_source
from clipscale.evaluators._summary import Clusters, confusion, example_rows, first_by_hash, group_hits, provenance, share, with_rows
from clipscale.inputs import Modality
from clipscale.intervals import bootstrap

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh

Weighted = Callable[[NDArray[np.float64]], float]
_RESULTS_SHOWN = 4
_RESAMPLES = 200
"""Each takes a decomposition of D×D or a product of N×N; the percentiles' own noise is then about 6 % of an interval's width."""


class Representation(Evaluator):
    """Modality gap, alignment, uniformity and effective rank of a medium and its captions; with labels, nearest neighbours."""

    source: Source
    """The data set; every sample's first caption is its text."""
    modality: Literal["image", "speech"] = "image"
    field: str | None = None
    """The record field that holds the class; then the share of rows is told whose nearest neighbours vote for it."""
    neighbours: int = Field(default=20, gt=0)
    """Neighbours that vote, each with weight exp(cosine / 0.07)."""
    most_rows: int = Field(default=2000, gt=1)
    """Rows that uniformity, rank, gap and alignment are taken over, chosen by the hash of their keys; the neighbours' vote uses all."""
    cluster: str | None = "speaker"
    """Rows that share this record field are not independent: intervals say so, and they do not vote for each other."""
    batch_size: int = Field(default=256, gt=0)

    def modalities(self) -> set[Modality]:
        return {self.modality, "text"}

    def check(self) -> None:
        check_source(self.source, self.modality)

    def evaluate(self, model: Encoders, mesh: Mesh) -> Evaluation:
        rows = embed_rows(model, mesh, self.source, self.modality, batch_size=self.batch_size)
        clusters = Clusters.by_field(rows, self.cluster)
        chosen = first_by_hash(rows.keys, self.most_rows)
        texts = embed_texts(model, mesh, [rows.captions[row][0] for row in chosen], batch_size=self.batch_size)
        figures = _geometry(
            rows.embeddings[chosen].double().cpu(),
            texts.double().cpu(),
            Clusters([clusters.of_row[row] for row in chosen], clusters.by),
            names=(self.modality, "text"),
        )
        labels = None if self.field is None else rows.field(self.field)
        plain = Evaluation(
            name="representation",
            kind="representation",
            figures=figures,
            examples=_examples(rows, self.modality, clusters, labels),
            provenance=provenance(self, [rows]),
        )
        return plain if labels is None else self._with_neighbours(mesh, rows, labels, clusters, plain)

    def _with_neighbours(self, mesh: Mesh, rows: Rows, labels: list[str], clusters: Clusters, plain: Evaluation) -> Evaluation:
        classes = in_order(labels)
        place = {label: number for number, label in enumerate(classes)}
        truth = torch.tensor([place[label] for label in labels])
        groups = dict.fromkeys(clusters.of_row)
        numbers = {cluster: number for number, cluster in enumerate(groups)}
        if len(groups) == 1:
            raise DataError(f"{rows.source}: all {len(rows)} samples have one '{clusters.by}', so that none has neighbours which may vote")
        together = torch.tensor([numbers[cluster] for cluster in clusters.of_row])
        own = leave_one_out_votes(rows.embeddings, truth, together, k=self.neighbours, rank=mesh.rank, world=mesh.world)
        answer = mesh.all_reduce_sum(own).cpu().numpy()
        hits = (answer == truth.numpy()).astype(np.int64)
        headline = with_rows(
            [share("neighbours_top1", hits, clusters, chance=1 / len(classes))],
            keys=rows.keys,
            truths=labels,
            answers=[classes[number] for number in answer.tolist()],
            modality=self.modality,
            source=rows.source,
        )
        return replace(
            plain,
            figures=[*headline, *plain.figures],
            confusion=confusion(self.field or "", classes, truth.numpy(), answer),
            groups={"class": group_hits(labels, hits, classes)},
        )


def _examples(rows: Rows, modality: Modality, clusters: Clusters, labels: list[str] | None) -> list[Example]:
    """A few samples and their nearest neighbours of other clusters."""
    chosen = example_rows(rows.keys)
    scores, places = nearest(rows.embeddings[chosen], rows.embeddings, len(rows))
    examples = []
    for row, best in zip(chosen, zip(scores.tolist(), places.tolist(), strict=True), strict=True):
        others = [(score, place) for score, place in zip(*best, strict=True) if clusters.of_row[place] != clusters.of_row[row]]
        results = [
            Item(
                modality,
                rows.keys[place],
                rows.source,
                rows.captions[place][0],
                score,
                None if labels is None else labels[place] == labels[row],
            )
            for score, place in others[:_RESULTS_SHOWN]
        ]
        examples.append(Example(Item(modality, rows.keys[row], rows.source, rows.captions[row][0]), results))
    return examples


def _geometry(x: Tensor, y: Tensor, clusters: Clusters, *, names: tuple[str, str]) -> list[Figure]:
    """Figures of paired embeddings x and y, [N, D] each."""
    distances = (x - y).square().sum(1).numpy()
    figures = [
        _number("modality_gap", lambda weights: modality_gap(x, y, weights), clusters, (0.0, 2.0)),
        _number("alignment", lambda weights: float(np.average(distances, weights=weights)), clusters, (0.0, 4.0)),
    ]
    for name, embeddings in zip(names, (x, y), strict=True):
        figures.append(_number(f"{name}_uniformity", uniformity(embeddings), clusters, (-8.0, 0.0)))
        figures.append(_number(f"{name}_effective_rank", partial(effective_rank, embeddings), clusters, (1.0, x.shape[1])))
    return figures


def _number(name: str, statistic: Weighted, clusters: Clusters, bounds: tuple[float, float]) -> Figure:
    """A statistic with its interval; a rank falls when rows come twice, so the interval is drawn up to the value where it lies below."""
    n = len(clusters.of_row)
    value = statistic(np.ones(n))
    found = bootstrap(statistic, clusters.of_row, by=clusters.by, bounds=bounds, resamples=_RESAMPLES)
    return Figure(name, value, n, min(found.low, value), max(found.high, value), found.method, unit="number")


def modality_gap(x: Tensor, y: Tensor, weights: NDArray[np.float64]) -> float:
    """Distance of the two modalities' weighted means: 0 when they share one region, at most 2."""
    share_of_row = torch.from_numpy(weights / weights.sum())
    return float((share_of_row @ (x - y)).norm())


def uniformity(x: Tensor) -> Weighted:
    """Logarithm of the mean of exp(-2 d²) over pairs of different rows: 0 when all are one point, the lower the better spread."""
    nearness = torch.exp(-2 * (2 - 2 * x @ x.T).clamp(min=0)).fill_diagonal_(0.0)

    def of_weights(weights: NDArray[np.float64]) -> float:
        w = torch.from_numpy(weights)
        pairs = w.sum().square() - w.square().sum()  # a row that was drawn twice is no pair with itself
        return float(torch.log(w @ nearness @ w / pairs))

    return of_weights


def effective_rank(x: Tensor, weights: NDArray[np.float64]) -> float:
    """exp of the entropy of the singular values, as shares of their sum: how many directions are used, 1 to D."""
    values = torch.linalg.eigvalsh(x.T @ (torch.from_numpy(weights)[:, None] * x)).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))
