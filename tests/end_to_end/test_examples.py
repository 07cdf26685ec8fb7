"""Every file of examples/ runs as its docstring says, and what it prints is right."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_run, write_squares, write_tones

from clipscale import train
from clipscale.config import Run, validate
from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.data.sources import Source
from clipscale.evaluators._embed import embed_rows, embed_texts
from clipscale.parallel.mesh import Mesh

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines that an example prints when run with these arguments."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_examples_are_few_and_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    elsewhere = {"open_clip_trainer.py"}  # tests/ranks/test_open_clip_trainer_ranks.py
    assert set(lengths) - elsewhere == {"own_objective.py", "embed_and_search.py"}, "an example needs a test here"
    assert max(lengths.values()) < 60


def test_the_own_objective_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of("own_objective.py", monkeypatch=monkeypatch, capsys=capsys)
    losses, hits = ([float(line.split()[place]) for line in lines] for place in (3, -1))
    assert len(lines) == 5
    assert losses == sorted(losses, reverse=True)
    assert (hits[0] < 0.1, hits[-1] > 0.95) == (True, True)


def test_the_own_objective_is_the_papers() -> None:
    objective = runpy.run_path(str(EXAMPLES / "own_objective.py"))["Dcl"]()
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(6, 4, generator=draw, dtype=torch.float64), dim=1) for _ in range(2))
    logits = 5 * x @ y.T
    energies = logits.exp() - torch.diag(torch.diag(logits.exp()))
    expected = ((energies.sum(0).log() + energies.sum(1).log()) / 2 - torch.diag(logits)).mean()  # equation 6, both views
    settings = ContrastSettings(tile_rows=2, tile_columns=4)
    found = contrastive_loss(objective, Pairs(x, y), torch.tensor(5.0, dtype=torch.float64), settings=settings, mesh=Mesh.single()).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("modality", "words"), [("image", "a red square"), ("speech", "a low tone")])
def test_the_search_finds_what_the_evaluators_would(
    modality: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squares, tones = write_squares(tmp_path, samples=16), write_tones(tmp_path, samples=16)
    run = validate(Run, tiny_run(tmp_path / "runs", squares, tones, steps=2))
    train.train(run, Mesh.single())
    capsys.readouterr()
    url = str(squares if modality == "image" else tones)
    arguments = [str(run.run_folder), url, words, *(["speech"] if modality == "speech" else [])]
    lines = output_of("embed_and_search.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    model = runpy.run_path(str(EXAMPLES / "embed_and_search.py"))["load"](run.run_folder)
    source = Source.model_validate({"name": "shards", "url": url})
    rows = embed_rows(model, Mesh.single(), source, modality, batch_size=5)  # type: ignore[arg-type]
    cosines = rows.embeddings @ embed_texts(model, Mesh.single(), [words], batch_size=5)[0]
    best = cosines.topk(5)
    assert [float(line.split()[0]) for line in lines] == pytest.approx(best.values.tolist(), abs=6e-4)  # three decimals are printed
    assert lines[0].split()[1] == rows.keys[int(best.indices[0])]
