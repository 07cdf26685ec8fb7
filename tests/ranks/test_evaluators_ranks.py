"""Evaluators on several ranks: the same integer counts, the same result on every rank, failures on all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lookup_model import damage, evaluator_settings, random_model, random_samples, write_shards

from clipscale.errors import ShardError
from clipscale.evaluators import Evaluation, Evaluator, _scoring
from clipscale.parallel.mesh import Mesh
from clipscale.settings import find_part

CASES = sorted(evaluator_settings(""))


def _evaluate(mesh: Mesh, url: str, case: str, batch_size: int) -> Evaluation:
    settings = {**evaluator_settings(url)[case], "batch_size": batch_size}
    _scoring.CHUNK_ELEMENTS = 5 * 23  # so that every rank has chunks of queries to score
    return find_part(Evaluator, settings.pop("name")).model_validate(settings).evaluate(random_model(), mesh)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("evaluators"), random_samples())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_counts_the_same(case: str, world: int, url: str, ranks: Callable[[int], Any]) -> None:
    alone = ranks(1)(_evaluate, url, case, 4)[0]
    together = ranks(world)(_evaluate, url, case, 4)
    assert all(result == together[0] for result in together)
    assert [(f.name, f.n, f.hits) for f in together[0].figures] == [(f.name, f.n, f.hits) for f in alone.figures]
    assert together[0].confusion == alone.confusion
    assert together[0].groups == alone.groups
    assert together[0] == alone  # intervals, scores and examples too: batches are the same for every world


def test_an_unreadable_sample_is_raised_on_every_rank(tmp_path: Path, ranks: Callable[[int], Any]) -> None:
    url = write_shards(tmp_path, random_samples())
    damage(url, "s012")
    messages = ranks(3)(_message, url)
    assert all("sample 's012' is not the one that was written" in message for message in messages)


def _message(mesh: Mesh, url: str) -> str:
    with pytest.raises(ShardError) as caught:
        _evaluate(mesh, url, "captions", 4)
    return str(caught.value)
