"""Scoring: embeddings and truth in, integer ranks and counts out; pure functions that know no model and no data.

N rows or queries, C classes, M gallery items, D embedding width. Rank 1 is best.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Scores held at once (128 MiB in fp32). Chunks depend on sizes alone, so every world size multiplies the same matrices."""


@dataclass(frozen=True)
class Classified:
    """What a classifier said about N rows."""

    rank: Tensor
    """int64 [N]: the true class's place. Of equal scores the class that comes first in the list wins, as in argmax."""
    predicted: Tensor
    """int64 [N]: the class in first place."""
    confidence: Tensor | None = None
    """fp32 [N]: the softmax probability of the class in first place, when a scale was given."""


def classify(rows: Tensor, classifier: Tensor, truth: Tensor, *, scale: float | None = None) -> Classified:
    """Rank the classes [C, D] for every row [N, D]; `truth` int64 [N]; `scale` is the model's own, not 100."""
    index = torch.arange(len(classifier), device=rows.device)
    ranks, predicted, confidence = [], [], []
    size = _chunk_rows(len(classifier))
    for start in range(0, len(rows), size):
        scores, true = rows[start : start + size] @ classifier.T, truth[start : start + size]
        own = scores.gather(1, true[:, None])
        before = (scores > own) | ((scores == own) & (index < true[:, None]))
        ranks.append(1 + before.sum(1))
        predicted.append(scores.argmax(1))
        if scale is not None:
            confidence.append((scale * scores).softmax(1).amax(1))
    return Classified(torch.cat(ranks), torch.cat(predicted), torch.cat(confidence) if confidence else None)


@dataclass(frozen=True)
class Retrieved:
    """What a gallery gave N queries."""

    rank: Tensor
    """int64 [N]: place of the best match. Equal scores count against it: every non-match that scores the same stands before it."""
    first: Tensor
    """int64 [N]: the gallery item in first place; a match only if the rank is 1."""
    matches: Tensor
    """int64 [N]: matches of the query in the gallery."""


def retrieve(queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, *, rank: int = 0, world: int = 1) -> Retrieved:
    """Rank the gallery [M, D] for every query [N, D] by counting what scores at least as high as the best match.

    Query and item match when they share an id: `query_ids` int64 [N, p] and `gallery_ids` int64 [M, q], rows padded with
    negative numbers. Every query must have a match. With `world` > 1 only each world-th chunk of queries is scored; the
    other rows are 0, so that the sum over ranks is the whole.
    """
    out = torch.zeros(3, len(queries), dtype=torch.int64, device=queries.device)
    size = _chunk_rows(len(gallery))
    for start in range(rank * size, len(queries), world * size):
        rows = slice(start, start + size)
        scores = queries[rows] @ gallery.T
        match = _share_an_id(query_ids[rows], gallery_ids)
        best, best_at = scores.masked_fill(~match, -math.inf).max(1)
        others = scores.masked_fill(match, -math.inf)
        other, other_at = others.max(1)
        out[0, rows] = 1 + (others >= best[:, None]).sum(1)
        out[1, rows] = torch.where(other >= best, other_at, best_at)
        out[2, rows] = match.sum(1)
    return Retrieved(*out)


def leave_one_out_votes(rows: Tensor, labels: Tensor, clusters: Tensor, *, k: int, rank: int = 0, world: int = 1) -> Tensor:
    """The class that each row's k nearest neighbours [N, D] vote for, int64 [N]; rows of its own cluster, itself too, have no vote.

    A vote weighs exp(cosine / 0.07). Of equal sums the first class wins. With `world` > 1 only each world-th chunk is scored; the
    other rows are 0, so that the sum over ranks is the whole.
    """
    num_classes, size = int(labels.max()) + 1, _chunk_rows(len(rows))
    labels, clusters = labels.to(rows.device), clusters.to(rows.device)
    out = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(rank * size, len(rows), world * size):
        own = slice(start, start + size)
        scores = (rows[own] @ rows.T).masked_fill(clusters[own, None] == clusters[None, :], -math.inf)
        best, places = scores.topk(min(k, len(rows)), dim=1)
        votes = torch.zeros(len(best), num_classes, dtype=best.dtype, device=rows.device)
        out[own] = votes.scatter_add_(1, labels[places], (best / 0.07).exp()).argmax(1)
    return out


def nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and positions [N, k] of the best k gallery items; of equal scores the earlier item first. For a few queries."""
    scores, places = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], places[:, :k]


def hits_at(rank: Tensor, k: int) -> NDArray[np.int64]:
    """1 where the rank is at most k, else 0."""
    return (rank <= k).cpu().numpy().astype(np.int64)


def chance_at(matches: Tensor, num_items: int, k: int) -> float:
    """The share of queries for which k of M items drawn blindly hold a match: mean of 1 - C(M - m, k) / C(M, k)."""
    counts = Counter(matches.tolist())
    missed = sum(queries * math.comb(num_items - m, k) / math.comb(num_items, k) for m, queries in counts.items())
    return 1.0 - missed / len(matches)


def confusion_counts(truth: NDArray[np.int64], answer: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """How often class i was taken for class j: [C, C]."""
    return np.bincount(truth * num_classes + answer, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(truth: NDArray[np.int64], answer: NDArray[np.int64], weights: NDArray[np.float64] | None = None) -> float:
    """Mean F1 over the classes that occur in truth or answers; rows may count more than once."""
    size = int(max(truth.max(), answer.max())) + 1
    right = np.bincount(truth, weights=(truth == answer) * (1.0 if weights is None else weights), minlength=size)
    occurring = np.bincount(truth, weights=weights, minlength=size) + np.bincount(answer, weights=weights, minlength=size)
    return float(np.mean(2 * right[occurring > 0] / occurring[occurring > 0]))


def mean_per_class(truth: NDArray[np.int64], hits: NDArray[np.int64], weights: NDArray[np.float64] | None = None) -> float:
    """Mean over the classes that occur of the share of hits among their rows."""
    ones = np.ones(len(truth)) if weights is None else weights
    occurring = np.bincount(truth, weights=ones)
    right = np.bincount(truth, weights=ones * hits)
    return float(np.mean(right[occurring > 0] / occurring[occurring > 0]))


def expected_calibration_error(
    confidence: NDArray[np.float64], hits: NDArray[np.int64], weights: NDArray[np.float64] | None = None, *, bins: int = 15
) -> float:
    """How far confidence lies from accuracy, on average over rows, in bins of equal width (Guo et al. 2017, arXiv:1706.04599)."""
    ones = np.ones(len(hits)) if weights is None else weights
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=ones * (confidence - hits), minlength=bins)
    return float(np.abs(gaps).sum() / ones.sum())


def _share_an_id(query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Which query and item share an id: [N, p] and [M, q] to bool [N, M]."""
    match = torch.zeros(len(query_ids), len(gallery_ids), dtype=torch.bool, device=query_ids.device)
    for own in query_ids.T:
        for theirs in gallery_ids.T:
            match |= (own[:, None] == theirs[None, :]) & (own[:, None] >= 0)
    return match


def _chunk_rows(width: int) -> int:
    return max(1, min(1024, CHUNK_ELEMENTS // width))
