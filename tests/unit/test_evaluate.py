"""Evaluating a checkpoint: what is written, what is refused before work, and that nothing is written by halves."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny import tiny_run, write_squares, write_tones

from clipscale import train
from clipscale.config import Run, validate
from clipscale.errors import ConfigError, DataError, RequestError, RunFolderError
from clipscale.evaluate import evaluate, evaluate_checkpoint
from clipscale.evaluators import Evaluation
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model

MESH = Mesh.single()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of training on squares and tones, with two evaluations in the settings."""
    folder = tmp_path_factory.mktemp("run")
    squares, tones = write_squares(folder, samples=24), write_tones(folder, samples=24)
    made = validate(Run, tiny_run(folder, squares, tones, evaluations=_evaluations(str(squares)), steps=2, checkpoints={"every_steps": 1}))
    train.train(made, MESH)
    return made


def _evaluations(squares: str) -> dict[str, Any]:
    source = {"name": "shards", "url": squares}
    return {
        "colours": {"name": "zero_shot_classification", "source": source, "templates": ["a {} square"]},
        "captions": {"name": "retrieval", "queries": {"modality": "image", "source": source}, "gallery": {"modality": "text"}},
    }


def _evaluate(run: Run, output: Path, *files: Path, overrides: tuple[str, ...] = ()) -> Path:
    return evaluate_checkpoint(run.run_folder, MESH, files=files, overrides=overrides, output=output)


def _layer(folder: Path, evaluations: dict[str, Any]) -> Path:
    path = folder / "layer.yaml"
    path.write_text(yaml.safe_dump({"evaluations": evaluations}))
    return path


def test_every_evaluation_and_the_checkpoint_it_is_of_are_written(run: Run, tmp_path: Path) -> None:
    folder = _evaluate(run, tmp_path / "out")
    written = json.loads((folder / "evaluation.json").read_text())
    assert list(written) == ["colours", "captions"]
    colours = Evaluation.from_json(written["colours"])
    assert (colours.name, colours.kind) == ("colours", "zero_shot_classification")
    assert (colours.provenance["checkpoint"], colours.provenance["step"]) == ("step-00000002", 2)
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.csv", "evaluation.json", "outcomes.parquet"]


def test_the_table_holds_every_figure_once(run: Run, tmp_path: Path) -> None:
    folder = _evaluate(run, tmp_path)
    with (folder / "evaluation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    evaluations = json.loads((folder / "evaluation.json").read_text())
    expected = {(name, figure["name"]): figure for name, result in evaluations.items() for figure in result["figures"]}
    assert len(lines) == len(expected)
    for line in lines:
        figure = expected[line["evaluation"], line["figure"]]
        assert (float(line["value"]), int(line["n"]), float(line["low"])) == (figure["value"], figure["n"], figure["low"])


def test_the_same_checkpoint_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    first, second = _evaluate(run, tmp_path / "1"), _evaluate(run, tmp_path / "2")
    for name in ("evaluation.json", "evaluation.csv", "outcomes.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_without_an_output_the_run_folder_is_written_into(run: Run) -> None:
    assert evaluate_checkpoint(run.run_folder, MESH, files=[], overrides=[], output=None) == run.run_folder
    assert (run.run_folder / "evaluation.json").is_file()


def test_one_checkpoint_of_a_run_can_be_named(run: Run, tmp_path: Path) -> None:
    folder = evaluate_checkpoint(run.run_folder / "checkpoints" / "step-00000001", MESH, files=[], overrides=[], output=tmp_path)
    assert json.loads((folder / "evaluation.json").read_text())["colours"]["provenance"]["step"] == 1


def test_evaluations_of_a_file_stand_in_for_the_runs_own(run: Run, tmp_path: Path) -> None:
    own = {"mine": _evaluations(run.pair_kinds["image_text"].sources["squares"].url)["colours"]}
    folder = _evaluate(run, tmp_path, _layer(tmp_path, own), overrides=("evaluations.mine.batch_size=5",))
    written = json.loads((folder / "evaluation.json").read_text())
    assert list(written) == ["mine"]
    assert written["mine"]["provenance"]["settings"]["batch_size"] == 5


def test_all_that_is_missing_is_said_at_once_and_nothing_written(run: Run, tmp_path: Path) -> None:
    evaluations = _evaluations(str(tmp_path / "nowhere"))
    with pytest.raises(DataError) as caught:
        _evaluate(run, tmp_path / "out", _layer(tmp_path, evaluations))
    assert "evaluations.colours: data set" in str(caught.value)
    assert "evaluations.captions: data set" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tower_the_model_lacks_is_named(tmp_path: Path) -> None:
    squares, tones = write_squares(tmp_path, samples=12), write_tones(tmp_path, samples=12)
    intents = {"name": "speech_intent", "source": {"name": "shards", "url": str(tones)}}
    settings = tiny_run(tmp_path, squares, evaluations={"spoken": intents}, steps=1)
    made = validate(Run, settings)
    train.train(made, MESH)
    with pytest.raises(DataError, match=r"evaluations\.spoken needs a tower for speech; the model encodes image, text"):
        _evaluate(made, tmp_path / "out")


def test_nothing_to_evaluate_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        _evaluate(run, tmp_path / "out", _layer(tmp_path, {}))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="neither a run folder with a whole checkpoint nor a checkpoint"):
        evaluate_checkpoint(tmp_path, MESH, files=[], overrides=[], output=None)


def test_an_output_that_is_a_file_is_refused_before_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="no writable folder"):
        _evaluate(run, tmp_path / "file" / "out")


def test_a_damaged_newest_checkpoint_is_passed_over(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run.run_folder, copied)
    weights = copied / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder = evaluate_checkpoint(copied, MESH, files=[], overrides=[], output=tmp_path / "out")
    assert json.loads((folder / "evaluation.json").read_text())["colours"]["provenance"]["step"] == 1
    assert "skipping a damaged checkpoint" in capsys.readouterr().err


def test_the_average_of_the_weights_is_evaluated_when_asked_for(run: Run, tmp_path: Path) -> None:
    squares = write_squares(tmp_path, samples=24)
    settings = tiny_run(tmp_path, squares, write_tones(tmp_path, samples=24), evaluations=_evaluations(str(squares)), steps=6)
    made = validate(Run, settings | {"optimizer": {"lr": 0.05, "average_decay": 0.9}})
    train.train(made, MESH)

    def figures(folder: Path) -> dict[str, Any]:
        return {name: result["figures"] for name, result in json.loads((folder / "evaluation.json").read_text()).items()}

    plain = figures(evaluate_checkpoint(made.run_folder, MESH, files=(), overrides=(), output=tmp_path / "plain"))
    averaged = evaluate_checkpoint(made.run_folder, MESH, files=(), overrides=(), output=tmp_path / "average", average=True)
    saved = made.run_folder / "checkpoints" / "step-00000006"
    model = build_model(made)
    model.load_state_dict({**load_file(saved / "model.safetensors"), **load_file(saved / "average.safetensors")})
    evaluate(made.evaluations, model, MESH, folder=tmp_path / "by_hand", provenance={})
    assert figures(averaged) == figures(tmp_path / "by_hand") != plain
    assert json.loads((averaged / "evaluation.json").read_text())["colours"]["provenance"]["weights"] == "average"
    with pytest.raises(RequestError, match=r"holds no average of the weights; train with optimizer\.average_decay"):
        evaluate_checkpoint(run.run_folder, MESH, files=(), overrides=(), output=tmp_path / "none", average=True)
    assert not (tmp_path / "none").exists()
