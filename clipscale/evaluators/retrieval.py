"""Retrieval: does a picture find its captions, a caption its picture, a spoken word the picture of what it says?

Recall at k is the share of queries with at least one match among the k best (any hit, as on COCO and Flickr30k, where an
image has five captions). Equal scores count against the match. What a match is, is a setting: the same sample, the same
words, or the same value of a record field; the last works across data sets that were never paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from clipscale.data.sources import Source
from clipscale.errors import DataError
from clipscale.evaluators import Confusion, Evaluation, Evaluator, Example, Figure, Group, Item
from clipscale.evaluators._embed import Rows, embed_rows, embed_texts
from clipscale.evaluators._prompts import in_order, normalise_caption
from clipscale.evaluators._scoring import Retrieved, chance_at, hits_at, nearest, retrieve
from clipscale.evaluators._sources import check_source
from clipscale.evaluators._summary import Clusters, confusion, example_rows, group_hits, mean, provenance, share, with_rows
from clipscale.inputs import Modality
from clipscale.intervals import bootstrap, weighted_median
from clipscale.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh

RECALL_AT = (1, 5, 10)
MAX_CONFUSION_CLASSES = 1000
_RESULTS_SHOWN = 5


class Side(Settings):
    """What is looked for, or among what."""

    modality: Modality
    source: Source | None = None
    """The data set. None, for the gallery: that of the queries."""


@dataclass(frozen=True)
class Items:
    """Queries or gallery items; n of them."""

    modality: Modality
    source: str
    keys: list[str]
    """The sample each belongs to."""
    texts: list[str]
    """What to print beside each."""
    names: list[list[str]]
    """What each matches by: items match when they share a name."""
    embeddings: Tensor
    """[n, D]"""
    clusters: Clusters

    def __len__(self) -> int:
        return len(self.keys)


class Retrieval(Evaluator):
    """Recall at 1, 5 and 10, mean reciprocal rank and median rank, one way or both."""

    queries: Side
    """What is looked for."""
    gallery: Side
    """Among what."""
    match: str = "pair"
    """`pair`: same key, and every caption of a sample is an item of its own; `caption`: same words, whatever the case and
    punctuation, and each distinct text is one item; anything else: the record field whose value must be the same."""
    both: bool = True
    """Also look for the queries among the gallery's items."""
    cluster: str | None = "speaker"
    """Queries that share this record field are not independent, and the interval says so; ignored where no record has it."""
    batch_size: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _sides_fit_together(self) -> Self:
        if self.queries.source is None:
            raise ValueError("queries.source is missing; only the gallery's has a default")
        if self.queries.modality == self.gallery.modality:
            raise ValueError(f"queries and gallery are both {self.gallery.modality}; retrieval goes from one modality to another")
        return self

    @property
    def _sources(self) -> tuple[Source, Source]:
        assert self.queries.source is not None
        return self.queries.source, self.gallery.source or self.queries.source

    def modalities(self) -> set[Modality]:
        return {self.queries.modality, self.gallery.modality}

    def check(self) -> None:
        for source, side in zip(self._sources, (self.queries, self.gallery), strict=True):
            check_source(source, side.modality)

    def evaluate(self, model: Encoders, mesh: Mesh) -> Evaluation:
        query_rows, gallery_rows = self._read(model, mesh)
        queries = self._items(model, mesh, query_rows, self.queries.modality)
        gallery = self._items(model, mesh, gallery_rows, self.gallery.modality)
        there = find(mesh, queries, gallery)
        figures, examples = self._figures(queries, gallery, there), _examples(queries, gallery)
        if self.both:
            figures += self._figures(gallery, queries, find(mesh, gallery, queries))
            examples += _examples(gallery, queries)
        return Evaluation(
            name="retrieval",
            kind="retrieval",
            figures=figures,
            confusion=self._confusion(queries, gallery, there),
            groups=self._groups(queries, there),
            examples=examples,
            provenance=provenance(self, [query_rows, gallery_rows]),
        )

    def _read(self, model: Encoders, mesh: Mesh) -> tuple[Rows, Rows]:
        """Both sides' samples; a data set that gives both the media and their captions is read once."""
        sides, (first, second) = (self.queries.modality, self.gallery.modality), self._sources
        if first == second and "text" in sides:
            rows = embed_rows(model, mesh, first, next(side for side in sides if side != "text"), batch_size=self.batch_size)
            return rows, rows
        return (
            embed_rows(model, mesh, first, sides[0], batch_size=self.batch_size),
            embed_rows(model, mesh, second, sides[1], batch_size=self.batch_size),
        )

    def _items(self, model: Encoders, mesh: Mesh, rows: Rows, modality: Modality) -> Items:
        items = list_items(rows, modality, match=self.match, cluster=self.cluster)
        if modality != "text":
            return items
        return replace(items, embeddings=embed_texts(model, mesh, items.texts, batch_size=self.batch_size))

    def _figures(self, queries: Items, gallery: Items, found: Retrieved) -> list[Figure]:
        way, by_field = f"{queries.modality}_to_{gallery.modality}", self.match not in ("pair", "caption")
        names = {k: f"{way}_top1_match" if by_field and k == 1 else f"{way}_R@{k}" for k in RECALL_AT if k < max(2, len(gallery))}
        recalls = [
            share(name, hits_at(found.rank, k), queries.clusters, chance=chance_at(found.matches, len(gallery), k))
            for k, name in names.items()
        ]
        rank = found.rank.cpu().numpy().astype(np.float64)
        bounds = (1.0, float(len(gallery)))
        middle = bootstrap(lambda weights: weighted_median(rank, weights), queries.clusters.of_row, by=queries.clusters.by, bounds=bounds)
        median = weighted_median(rank, np.ones(len(rank)))
        figures = [
            *recalls,
            mean(f"{way}_MRR", 1 / rank, queries.clusters),
            Figure(f"{way}_median_rank", median, len(rank), middle.low, middle.high, middle.method, unit="rank"),
        ]
        return with_rows(
            figures,
            keys=queries.keys,
            truths=queries.texts,
            answers=[gallery.texts[place] for place in found.first.tolist()],
            modality=queries.modality,
            source=queries.source,
        )

    def _confusion(self, queries: Items, gallery: Items, found: Retrieved) -> Confusion | None:
        """The queries' field value against that of what came first; only where a field is matched."""
        if self.match in ("pair", "caption"):
            return None
        truth = [own[0] for own in queries.names]
        answer = [gallery.names[first][0] for first in found.first.tolist()]
        classes = in_order([*truth, *answer])
        if len(classes) > MAX_CONFUSION_CLASSES:
            return None
        place = {name: index for index, name in enumerate(classes)}
        counts = (np.array([place[name] for name in names]) for names in (truth, answer))
        return confusion(self.match, classes, *counts)

    def _groups(self, queries: Items, found: Retrieved) -> dict[str, list[Group]]:
        groups: dict[str, list[Group]] = {}
        hits = hits_at(found.rank, 1)
        if self.match not in ("pair", "caption"):
            values = [own[0] for own in queries.names]
            groups[self.match] = group_hits(values, hits, in_order(values))
        if queries.clusters.by == self.cluster:
            groups[queries.clusters.by] = group_hits(queries.clusters.of_row, hits)
        return groups


def list_items(rows: Rows, modality: Modality, *, match: str, cluster: str | None) -> Items:
    """The queries or gallery items a data set offers; texts have no embeddings yet."""
    names = _names(rows, match)
    clusters = Clusters.by_field(rows, cluster)
    if modality != "text":
        first_captions = [captions[0] for captions in rows.captions]
        return Items(modality, rows.source, rows.keys, first_captions, names, rows.embeddings, clusters)
    texts = [(row, caption) for row, captions in enumerate(rows.captions) for caption in captions]
    if match == "caption":
        distinct: dict[str, tuple[int, str]] = {}
        for row, caption in texts:
            distinct.setdefault(normalise_caption(caption), (row, caption))
        texts = list(distinct.values())
    owners = [row for row, _ in texts]
    return Items(
        modality,
        rows.source,
        [rows.keys[row] for row in owners],
        [caption for _, caption in texts],
        [[normalise_caption(caption)] if match == "caption" else names[row] for row, caption in texts],
        rows.embeddings[:0],
        _text_clusters(clusters, owners, independent=match == "caption"),
    )


def find(mesh: Mesh, queries: Items, gallery: Items) -> Retrieved:
    """Rank the gallery for every query, each rank a share of them; the result on all ranks.

    Raises:
        DataError: a query has no match in the gallery.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for own in gallery.names for name in own))}
    alone = [key for key, own in zip(queries.keys, queries.names, strict=True) if not any(name in numbers for name in own)]
    if alone:
        raise DataError(
            f"{len(alone)} of {len(queries)} {queries.modality} queries from {queries.source} have no match among the {gallery.modality} "
            f"items of {gallery.source}: {', '.join(alone[:5])}; their recall would be 0 whatever the model"
        )
    device = queries.embeddings.device
    query_ids, gallery_ids = (_ids(items.names, numbers).to(device) for items in (queries, gallery))
    own = retrieve(queries.embeddings, gallery.embeddings, query_ids, gallery_ids, rank=mesh.rank, world=mesh.world)
    return Retrieved(mesh.all_reduce_sum(own.rank), mesh.all_reduce_sum(own.first), mesh.all_reduce_sum(own.matches))


def _names(rows: Rows, match: str) -> list[list[str]]:
    if match == "pair":
        return [[key] for key in rows.keys]
    if match == "caption":
        return [list(dict.fromkeys(normalise_caption(caption) for caption in captions)) for captions in rows.captions]
    return [[value] for value in rows.field(match)]


def _text_clusters(of_samples: Clusters, owners: list[int], *, independent: bool) -> Clusters:
    """Captions of one sample go together, and with them all samples of its cluster; distinct texts stand for themselves."""
    if independent:
        return Clusters(range(len(owners)), "row")
    by = of_samples.by if of_samples.by != "row" or len(set(owners)) == len(owners) else "sample"
    return Clusters([of_samples.of_row[row] for row in owners], by)


def _ids(names: Sequence[Sequence[str]], numbers: dict[str, int]) -> Tensor:
    """Names as numbers [n, p], rows padded with -1; names nobody else knows are left out."""
    known = [[numbers[name] for name in own if name in numbers] for own in names]
    width = max(map(len, known))
    return torch.tensor([own + [-1] * (width - len(own)) for own in known])


def _examples(queries: Items, gallery: Items) -> list[Example]:
    chosen = example_rows([f"{key}\n{text}" for key, text in zip(queries.keys, queries.texts, strict=True)])
    scores, places = nearest(queries.embeddings[chosen], gallery.embeddings, _RESULTS_SHOWN)
    return [
        Example(_item(queries, row), [_item(gallery, place, score, queries.names[row]) for score, place in zip(*best, strict=True)])
        for row, best in zip(chosen, zip(scores.tolist(), places.tolist(), strict=True), strict=True)
    ]


def _item(items: Items, place: int, score: float | None = None, wanted: Sequence[str] = ()) -> Item:
    correct = None if score is None else not set(wanted).isdisjoint(items.names[place])
    return Item(items.modality, items.keys[place], items.source, items.texts[place], score, correct)
