"""Retrieval's arithmetic against a written-out loop over all pairs, and hand-made ties."""

from __future__ import annotations

import itertools

import pytest
import torch

from clipscale.evaluators import _scoring
from clipscale.evaluators._scoring import chance_at, nearest, retrieve


def _naive_ranks(queries: torch.Tensor, gallery: torch.Tensor, matches: list[set[int]]) -> list[int]:
    """Sort every gallery, matches last among equals, and walk down to the first match."""
    ranks = []
    for query, own in zip(queries, matches, strict=True):
        scored = sorted(((-float(query @ item), place in own) for place, item in enumerate(gallery)))
        ranks.append(1 + [is_match for _, is_match in scored].index(True))
    return ranks


def _random_problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[set[int]]]:
    """23 queries with 1 to 3 ids each, 41 items with one; coarse integer embeddings, so that ties abound and floats are exact."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (23, 4), generator=generator).float()
    gallery = torch.randint(-1, 2, (41, 4), generator=generator).float()
    gallery_ids = torch.cat([torch.arange(12), torch.randint(12, (29,), generator=generator)])[:, None]
    query_ids = torch.randint(12, (23, 3), generator=generator)
    query_ids[::2, 1:] = -1
    matches = [{place for place, (own,) in enumerate(gallery_ids.tolist()) if own in ids} for ids in query_ids.tolist()]
    return queries, gallery, query_ids, gallery_ids, matches


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunk_elements", [41, 41 * 5, 1 << 20])
def test_ranks_equal_the_sorted_gallery_for_any_chunk(seed: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scoring, "CHUNK_ELEMENTS", chunk_elements)
    queries, gallery, query_ids, gallery_ids, matches = _random_problem(seed)
    result = retrieve(queries, gallery, query_ids, gallery_ids)
    assert result.rank.tolist() == _naive_ranks(queries, gallery, matches)
    assert result.matches.tolist() == [len(own) for own in matches]


@pytest.mark.parametrize("seed", range(8))
def test_the_first_item_is_a_match_exactly_when_the_rank_is_one(seed: int) -> None:
    queries, gallery, query_ids, gallery_ids, matches = _random_problem(seed)
    result = retrieve(queries, gallery, query_ids, gallery_ids)
    assert [first in own for first, own in zip(result.first.tolist(), matches, strict=True)] == (result.rank == 1).tolist()
    best = (queries @ gallery.T).max(1).values
    assert torch.equal((queries * gallery[result.first]).sum(1), best)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_all_ranks_add_up_to_the_whole(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scoring, "CHUNK_ELEMENTS", 41 * 4)
    queries, gallery, query_ids, gallery_ids, _ = _random_problem(0)
    whole = retrieve(queries, gallery, query_ids, gallery_ids)
    shares = [retrieve(queries, gallery, query_ids, gallery_ids, rank=rank, world=world) for rank in range(world)]
    for name in ("rank", "first", "matches"):
        assert torch.equal(sum(getattr(share, name) for share in shares), getattr(whole, name))


def test_an_equal_score_counts_against_the_match() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([[5], [6], [7], [8]])
    assert retrieve(query, gallery, torch.tensor([[5]]), ids).rank.tolist() == [3]  # two others score the same
    assert retrieve(query, gallery, torch.tensor([[5, 6, 7]]), ids).rank.tolist() == [1]  # all three are matches


def test_one_match_of_many_in_first_place_is_a_hit() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.0, 1.0], [0.8, 0.2]])
    ids = torch.tensor([[0], [0], [1], [0], [2]])  # three captions of image 0; the others lie at places 4 and 5
    assert retrieve(query, gallery, torch.tensor([[0]]), ids).rank.tolist() == [1]


@pytest.mark.parametrize(("num_items", "k"), [(6, 1), (6, 2), (7, 5)])
def test_chance_equals_counting_all_draws(num_items: int, k: int) -> None:
    matches = [1, 2, 2, 3]
    draws = list(itertools.combinations(range(num_items), k))
    expected = sum(sum(any(item < m for item in draw) for draw in draws) / len(draws) for m in matches) / len(matches)
    assert chance_at(torch.tensor(matches), num_items, k) == pytest.approx(expected, abs=1e-12)


def test_nearest_keeps_the_gallery_order_among_equals() -> None:
    scores, places = nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), 3)
    assert places.tolist() == [[1, 3, 2]]
    assert scores.tolist() == [[1.0, 1.0, 0.5]]
