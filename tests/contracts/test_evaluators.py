"""What every evaluator keeps, whatever it asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lookup_model import Sample, damage, evaluator_settings, random_model, random_samples, write_shards

from clipscale.errors import DataError, RunError, ShardError
from clipscale.evaluators import Evaluation, Evaluator
from clipscale.parallel.mesh import Mesh
from clipscale.settings import find_part, part_names

CASES = sorted(evaluator_settings(""))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("evaluators"), random_samples())


def _build(case: str, url: str, **changes: object) -> Evaluator:
    settings = evaluator_settings(url)[case]
    part = find_part(Evaluator, settings["name"])
    return part.model_validate({**{key: value for key, value in settings.items() if key != "name"}, **changes})


def _evaluate(case: str, url: str, **changes: object) -> Evaluation:
    return _build(case, url, **changes).evaluate(random_model(), Mesh.single())


def test_every_evaluator_has_a_case() -> None:
    assert {settings["name"] for settings in evaluator_settings("").values()} == set(part_names(Evaluator.folder))


@pytest.mark.parametrize("case", CASES)
def test_every_figure_has_its_n_and_an_interval_around_it(case: str, url: str) -> None:
    result = _evaluate(case, url)
    assert result.figures
    assert len({figure.name for figure in result.figures}) == len(result.figures)
    for figure in result.figures:
        assert figure.n > 0
        assert figure.interval
        if figure.unit == "share":
            assert 0 <= figure.low <= figure.value <= figure.high <= 1
            assert figure.high > figure.low
        if figure.hits is not None:
            assert figure.value == figure.hits / figure.n


@pytest.mark.parametrize("case", CASES)
def test_confusion_and_groups_add_up_to_the_headline(case: str, url: str) -> None:
    result = _evaluate(case, url)
    headline = result.figures[0]
    if result.confusion is not None:
        assert sum(map(sum, result.confusion.counts)) == headline.n
        assert sum(row[index] for index, row in enumerate(result.confusion.counts)) == headline.hits
    for groups in result.groups.values():
        assert (sum(group.n for group in groups), sum(group.hits for group in groups)) == (headline.n, headline.hits)


@pytest.mark.parametrize("case", CASES)
def test_json_gives_the_evaluation_back(case: str, url: str) -> None:
    result = _evaluate(case, url)
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_of_any_size_count_the_same_hits(case: str, batch_size: int, url: str) -> None:
    expected, result = _evaluate(case, url), _evaluate(case, url, batch_size=batch_size)
    assert [(figure.name, figure.hits, figure.n) for figure in result.figures] == [(f.name, f.hits, f.n) for f in expected.figures]
    assert result.confusion == expected.confusion
    assert result.groups == expected.groups


@pytest.mark.parametrize("case", CASES)
def test_the_same_evaluation_twice_is_the_same(case: str, url: str) -> None:
    assert _evaluate(case, url) == _evaluate(case, url)


@pytest.mark.parametrize("case", CASES)
def test_examples_name_samples_of_the_data_set(case: str, url: str) -> None:
    result = _evaluate(case, url)
    keys = {f"s{number:03d}" for number in range(len(random_samples()))}
    assert result.examples
    for example in result.examples:
        assert example.query.source == url
        assert example.query.key in keys
        scores = [item.score for item in example.results]
        assert scores == sorted(scores, reverse=True)
        assert all((item.key in keys) == (item.source == url) for item in example.results)


@pytest.mark.parametrize("case", CASES)
def test_the_model_comes_back_as_it_was(case: str, url: str) -> None:
    model = random_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _build(case, url).evaluate(model, Mesh.single())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_missing_data_set_is_refused_before_anything_is_read(case: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        _build(case, str(tmp_path / "nowhere")).check()


@pytest.mark.parametrize("case", CASES)
def test_samples_without_the_modality_are_refused_before_anything_is_read(case: str, tmp_path: Path) -> None:
    samples = random_samples()
    evaluator = _build(case, str(tmp_path))
    lacking = {"image": {"image": None}, "speech": {"speech": None}}
    modality = sorted(evaluator.modalities() - {"text"})[0]
    samples[4] = Sample(**{**vars(samples[4]), **lacking[modality]})
    write_shards(tmp_path, samples)
    with pytest.raises(DataError, match=f"must hold {modality} to be evaluated, but 1 of its 23 samples have none"):
        evaluator.check()


@pytest.mark.parametrize("case", CASES)
def test_an_unreadable_sample_stops_it_by_name(case: str, tmp_path: Path) -> None:
    url = write_shards(tmp_path, random_samples())
    damage(url, "s012")
    with pytest.raises(ShardError, match=r"cannot be read: .* sample 's012' is not the one that was written"):
        _evaluate(case, url)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_that_are_not_finite_stop_it(case: str, url: str) -> None:
    model = random_model()
    for linear in model.projections.values():
        linear.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="embeddings are not finite"):
        _build(case, url).evaluate(model, Mesh.single())


@pytest.mark.parametrize("case", CASES)
def test_settings_and_data_are_on_record(case: str, url: str) -> None:
    result = _evaluate(case, url)
    assert result.provenance["data"][url]["samples"] == 23
    assert len(result.provenance["data"][url]["sha256"]) == 64
    assert result.provenance["settings"]["name"] == result.kind
