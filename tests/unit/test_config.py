"""Layers, overrides and the checks of a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_run

from clipscale.config import Run, load_run, merge, read_layers, read_yaml, to_yaml, validate
from clipscale.errors import ConfigError


def write(path: Path, text: str) -> Path:
    """A YAML file."""
    path.write_text(text)
    return path


def settings(**changes: Any) -> dict[str, Any]:
    """A run's settings, of data that need not exist."""
    return tiny_run(Path("runs"), Path("squares"), Path("tones"), **changes)


def test_layers_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    what = write(tmp_path / "what.yaml", "seed: 1\noptimizer: {lr: 0.1, eps: 1.0}\n")
    where = write(tmp_path / "where.yaml", "optimizer: {lr: 0.2}\nworkers: 3\n")
    merged = read_layers([what, where], ["optimizer.eps=2e-8", "name=x"])
    assert merged == {"seed": 1, "optimizer": {"lr": 0.2, "eps": 2e-8}, "workers": 3, "name": "x"}


def test_extends_is_the_same_merge_and_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "a.yaml", "seed: 1\noptimizer: {lr: 0.1}\n")
    child = write(tmp_path / "b.yaml", "extends: base/a.yaml\noptimizer: {eps: 1.0}\n")
    assert read_yaml(child) == {"seed": 1, "optimizer": {"lr": 0.1, "eps": 1.0}}


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_yaml(write(tmp_path / "b.yaml", "extends: a.yaml\n"))


def test_another_part_replaces_the_old_one_with_its_settings() -> None:
    below = {"name": "run", "objective": {"name": "clip", "label_smoothing": 0.1}}
    above = {"name": "other", "objective": {"name": "siglip"}}
    assert merge(below, above) == {"name": "other", "objective": {"name": "siglip"}}
    assert merge(below, {"objective": {"label_smoothing": 0.2}})["objective"] == {"name": "clip", "label_smoothing": 0.2}


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E5", 1e5), ("-2.5e-3", -2.5e-3), (".5e1", 5.0), ("12", 12), ("e5", "e5")])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str, value: object) -> None:
    found = read_yaml(write(tmp_path / "a.yaml", f"x: {text}\n"))["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "repeated key a"),
        ("a: [1\n", "not readable as YAML"),
        ("- 1\n", "a configuration is a mapping"),
        ("a: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"a\.yaml.*{message}|{message}"):
        read_yaml(write(tmp_path / "a.yaml", text))


def test_a_missing_file_and_a_word_that_is_no_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match="neither a YAML file nor an override"):
        read_layers([], ["nonsense"])


def test_resolved_settings_read_back_to_the_same_settings() -> None:
    run = validate(Run, settings())
    text = to_yaml(run)
    assert validate(Run, yaml.safe_load(text)) == run
    assert to_yaml(validate(Run, yaml.safe_load(text))) == text


def test_all_mistakes_are_shown_at_once_with_paths_and_suggestions() -> None:
    wrong = settings(optimiser={"lr": 1.0}, seed="one")
    wrong["pair_kinds"]["image_text"]["objective"] = {"name": "clip", "label_smoothin": 0.1}
    wrong["towers"]["image"]["name"] = "conv_imge"
    with pytest.raises(ConfigError) as caught:
        validate(Run, wrong)
    message = str(caught.value)
    assert "4 mistakes" in message
    for expected in (
        "optimiser: there is no such setting, did you mean 'optimizer'?",
        'seed: Input should be a valid integer (found "one")',
        "pair_kinds.image_text.objective.label_smoothin: there is no such setting, did you mean 'label_smoothing'?",
        "towers.image: there is no 'conv_imge' in clipscale.towers, did you mean 'conv_image'?",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("towers", "text", "locked"), False, "cached_rows needs"),
        (("pair_kinds", "image_text", "modalities"), ["image", "image"], "a pair needs two different ones"),
        (("towers", "speech"), {"name": "conv_image"}, "'conv_image' encodes image, not speech"),
        (("lanes",), 5, "global_batch: 12 is not a multiple of lanes = 5"),
        (("name",), "../x", "String should match pattern"),
    ],
)
def test_impossible_combinations_are_refused(path: tuple[str, ...], value: object, message: str) -> None:
    wrong = settings()
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        validate(Run, wrong)


def test_cwcl_wants_a_locked_text_tower() -> None:
    wrong = settings()
    wrong["towers"]["text"] = {**wrong["towers"]["text"], "locked": False, "cached_rows": 0}
    with pytest.raises(ConfigError, match=r"takes its weights from the locked text tower; set towers\.text\.locked: true"):
        validate(Run, wrong)


def test_a_pair_kind_without_its_tower_and_a_tower_without_a_pair_kind_are_both_named() -> None:
    wrong = settings()
    del wrong["towers"]["image"]
    with pytest.raises(ConfigError, match=r"pair_kinds\.image_text: no tower for image"):
        validate(Run, wrong)
    wrong = settings()
    del wrong["pair_kinds"]["image_text"]
    with pytest.raises(ConfigError, match=r"towers\.image: no pair kind uses it"):
        validate(Run, wrong)


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_nearest_that_fit() -> None:
    run = validate(Run, settings(engine="ddp"))
    run.check_world(4)
    with pytest.raises(ConfigError, match=r"image_text\.global_batch 12 is not a multiple of the 5 ranks; nearest that fit: 10, 15"):
        run.check_world(5)


def test_the_local_engine_refuses_two_ranks_and_a_grid_must_divide_them() -> None:
    with pytest.raises(ConfigError, match="set engine: ddp"):
        validate(Run, settings()).check_world(2)
    with pytest.raises(ConfigError, match="grid_rows 3 does not divide the 4 ranks"):
        validate(Run, settings(engine="ddp", contrast={"grid_rows": 3})).check_world(4)
