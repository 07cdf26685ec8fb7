"""Retrieval: its arithmetic against a written-out loop over all pairs, the whole of it on vectors that are set by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from lookup_model import Sample, make_model, write_shards

from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, _scoring
from clipscale.evaluators._scoring import chance_at, nearest, retrieve
from clipscale.evaluators.retrieval import Retrieval
from clipscale.parallel.mesh import Mesh


def _naive_ranks(queries: torch.Tensor, gallery: torch.Tensor, matches: list[set[int]]) -> list[int]:
    """Sort every gallery, matches last among equals, and walk down to the first match."""
    ranks = []
    for query, own in zip(queries, matches, strict=True):
        scored = sorted(((-float(query @ item), place in own) for place, item in enumerate(gallery)))
        ranks.append(1 + [is_match for _, is_match in scored].index(True))
    return ranks


def _random_problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[set[int]]]:
    """23 queries with 1 to 3 ids each, 41 items with 1 or 2; coarse integer embeddings, so that ties abound and floats are exact."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (23, 4), generator=generator).float()
    gallery = torch.randint(-1, 2, (41, 4), generator=generator).float()
    gallery_ids = torch.randint(12, (41, 2), generator=generator)
    gallery_ids[:12, 0] = torch.arange(12)
    gallery_ids[::2, 1] = -1
    query_ids = torch.randint(12, (23, 3), generator=generator)
    query_ids[::2, 1:] = -1
    real = [[{number for number in row if number >= 0} for row in ids.tolist()] for ids in (query_ids, gallery_ids)]
    matches = [{place for place, theirs in enumerate(real[1]) if own & theirs} for own in real[0]]
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


# --- the whole evaluator, on hand-made vectors ---------------------------------------------------------------------


def _evaluate(url: str, model_tables: dict[str, object], **settings: object) -> Evaluation:
    source = {"name": "shards", "url": url}
    sides = {"queries": {"modality": "image", "source": source}, "gallery": {"modality": "text"}}
    return Retrieval.model_validate({**sides, **settings}).evaluate(make_model(**model_tables), Mesh.single())  # type: ignore[arg-type]


PAIRS = [Sample(["one", "uno"], image=0), Sample(["two", "due"], image=1), Sample(["three"], image=2)]
PAIR_TABLES = {
    "images": [[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]],
    "texts": {"one": [1.0, 0, 0], "uno": [0.0, 1, 0.1], "two": [0.1, 0.9, 0], "due": [0, 1.0, 0.2], "three": [0.0, 0.9, 1]},
}


def test_every_caption_is_an_item_and_any_of_them_is_a_hit(tmp_path: Path) -> None:
    result = _evaluate(write_shards(tmp_path, PAIRS), PAIR_TABLES)
    forward, backward = result.figure("image_to_text_R@1"), result.figure("text_to_image_R@1")
    # image 0 finds "one"; image 1 finds "uno" (cosine 0.995) before "two" (0.994); image 2 finds "three"
    assert (forward.hits, forward.n, forward.interval) == (2, 3, "wilson")
    # "uno" finds image 1 instead of 0; all others find theirs
    assert (backward.hits, backward.n, backward.interval) == (4, 5, "cluster bootstrap by sample")
    assert result.figure("image_to_text_MRR").value == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert result.figure("text_to_image_median_rank").value == 1.0
    assert forward.chance == pytest.approx((2 / 5 + 2 / 5 + 1 / 5) / 3)


def test_recalls_beyond_the_gallery_are_left_out(tmp_path: Path) -> None:
    names = [figure.name for figure in _evaluate(write_shards(tmp_path, PAIRS), PAIR_TABLES).figures]
    assert [name for name in names if "R@" in name] == ["image_to_text_R@1", "text_to_image_R@1"]


def test_one_way_only_when_asked(tmp_path: Path) -> None:
    names = [figure.name for figure in _evaluate(write_shards(tmp_path, PAIRS), PAIR_TABLES, both=False).figures]
    assert names == ["image_to_text_R@1", "image_to_text_MRR", "image_to_text_median_rank"]


SPOKEN = [
    Sample(["Lights on."], speech=0, record={"speaker": "anna"}),
    Sample(["lights ON"], speech=1, record={"speaker": "anna"}),
    Sample(["heat up"], speech=2, record={"speaker": "ben"}),
]


def test_the_same_words_are_one_item_and_match_every_recording_of_them(tmp_path: Path) -> None:
    tables = {"speech": [[1.0, 0.1], [0.9, 0.2], [0.8, 0.1]], "texts": {"Lights on.": [1.0, 0], "heat up": [0.0, 1]}}
    source = {"name": "shards", "url": write_shards(tmp_path, SPOKEN)}
    result = _evaluate("", tables, queries={"modality": "speech", "source": source}, match="caption")
    forward, backward = result.figure("speech_to_text_R@1"), result.figure("text_to_speech_R@1")
    assert (forward.hits, forward.n, forward.interval) == (2, 3, "cluster bootstrap by speaker")
    assert forward.chance == pytest.approx(1 / 2)
    # "lights on" finds recording 0; "heat up" finds recording 1 first
    assert (backward.hits, backward.n, backward.interval) == (1, 2, "wilson")
    assert backward.chance == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_a_record_field_matches_across_data_sets_that_were_never_paired(tmp_path: Path) -> None:
    spoken = [
        Sample([f"say {label}"], speech=row, record={"label": label, "speaker": who})
        for row, (label, who) in enumerate([("7", "anna"), ("8", "anna"), ("7", "ben"), ("8", "ben")])
    ]
    drawn = [Sample([f"draw {label}"], image=row, record={"label": label}) for row, label in enumerate([7, 8, 7])]
    tables = {
        "speech": [[1.0, 0, 0], [0.0, 1, 0], [0.1, 0, 1], [0.9, 0.3, 0]],
        "images": [[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]],
        "texts": {"unused": [1.0, 0, 0]},
    }
    sources = {name: {"name": "shards", "url": write_shards(tmp_path / name, samples)} for name, samples in (("a", spoken), ("b", drawn))}
    result = _evaluate(
        "",
        tables,
        queries={"modality": "speech", "source": sources["a"]},
        gallery={"modality": "image", "source": sources["b"]},
        match="label",
        both=False,
    )
    figure = result.figure("speech_to_image_top1_match")
    assert (figure.hits, figure.n, figure.interval) == (3, 4, "cluster bootstrap by speaker")  # the last "8" finds a 7
    assert figure.chance == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result.confusion is not None
    assert (result.confusion.field, result.confusion.classes, result.confusion.counts) == ("label", ["7", "8"], [[2, 0], [1, 1]])
    assert {group.name: (group.hits, group.n) for group in result.groups["label"]} == {"7": (2, 2), "8": (1, 2)}


def test_a_query_without_a_match_is_refused_by_name(tmp_path: Path) -> None:
    images = write_shards(tmp_path / "a", [*PAIRS, Sample(["four"], image=1)])
    texts = write_shards(tmp_path / "b", PAIRS)
    with pytest.raises(DataError, match=r"1 of 4 image queries .* have no match among the text items .*: s003"):
        _evaluate(images, PAIR_TABLES, gallery={"modality": "text", "source": {"name": "shards", "url": texts}})


def test_examples_show_the_best_first_and_say_what_is_correct(tmp_path: Path) -> None:
    result = _evaluate(write_shards(tmp_path, PAIRS), PAIR_TABLES)
    shown = {example.query.key: example for example in result.examples if example.query.modality == "image"}
    assert [(item.text, item.correct) for item in shown["s001"].results[:2]] == [("uno", False), ("two", True)]
    assert shown["s001"].results[0].score == pytest.approx(1 / (1 + 0.01) ** 0.5, abs=1e-6)


def test_two_sides_of_one_modality_are_refused() -> None:
    with pytest.raises(ValueError, match="queries and gallery are both text"):
        _evaluate("nowhere", PAIR_TABLES, queries={"modality": "text", "source": {"name": "shards", "url": "nowhere"}})
