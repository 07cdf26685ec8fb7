"""The whole system, tiny: shards are built, two pair kinds train, the run resumes, is evaluated and reported. Start reading here."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny_run, write_squares, write_tones

from clipscale.config import Run, validate
from clipscale.evaluate import evaluate_checkpoint
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.report import write_report
from clipscale.train import train


def test_everything_from_pictures_to_a_report(tmp_path: Path) -> None:
    squares, tones = write_squares(tmp_path, samples=48), write_tones(tmp_path, samples=24)
    source = {"name": "shards", "url": str(squares)}
    evaluation = {"name": "zero_shot_classification", "source": source, "field": "label", "templates": ["a {} square"]}
    settings = tiny_run(tmp_path / "runs", squares, tones, steps=80, evaluations={"colours": evaluation})
    run, mesh = validate(Run, settings), Mesh.single()

    assert train(run, mesh, stop_after=10).ended == "stopped"
    assert train(run, mesh).ended == "finished"
    steps = read_json_lines(run.run_folder / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 81))

    folder = evaluate_checkpoint(run.run_folder, mesh, files=[], overrides=[], output=None)
    (headline, *_) = json.loads((folder / "evaluation.json").read_text())["colours"]["figures"]
    assert headline["n"] == 48
    assert headline["value"] > 0.9, "four colours are told apart by their names; guessing would reach 0.25"
    assert headline["low"] <= headline["value"] <= headline["high"]

    page = write_report(run.run_folder).read_text()
    assert "image_text" in page
    assert "speech_text" in page
    assert "colours" in page
