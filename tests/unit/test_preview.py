"""`clipscale data`: what a run will read, told before it runs, and a page that needs no network."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from html_tree import Page
from tiny import tiny_run, write_squares, write_tones

from clipscale.cli import main
from clipscale.config import Run, validate
from clipscale.data.shards import open_dataset
from clipscale.preview import html_page, survey
from clipscale.run_model import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Squares and tones."""
    folder = tmp_path_factory.mktemp("data")
    return write_squares(folder, samples=48), write_tones(folder, samples=24)


def settings(folder: Path, data: tuple[Path, Path]) -> dict[str, object]:
    run = tiny_run(folder, *data, steps=40, augment={"image": {"flip": 0.5}, "speech": {"time_masks": 2}})
    run["pair_kinds"]["image_text"]["sources"]["again"] = {"name": "shards", "url": str(data[0]), "weight": 3.0, "later_weights": {20: 1.0}}
    return run


def test_the_survey_tells_the_mix_epochs_and_padding(tmp_path: Path, data: tuple[Path, Path]) -> None:
    """40 steps of 12: 20 with weights 1 : 3, 20 with 1 : 1; tones at every other step, 20 batches of 8 of 24 recordings."""
    run = validate(Run, settings(tmp_path, data))
    pictures, tones = survey(run, build_model(run), measure_s=0.1)
    rows = {source.name: source.rows for source in pictures.sources}
    assert rows == {"squares": 20 * 3 + 20 * 6, "again": 20 * 9 + 20 * 6}
    assert [source.epochs for source in pictures.sources] == [180 / 48, 300 / 48]
    assert pictures.weight_changes == {20: {"again": 1.0}}
    assert (tones.batches, tones.sources[0].rows, tones.sources[0].samples, tones.sources[0].shards) == (20, 160, 24, 2)
    columns = [open_dataset(data[1]).sidecar(shard).columns for shard in range(2)]
    seconds = np.concatenate([column["frames"] / column["sample_rate"] for column in columns])
    by_length = np.sort(np.concatenate([seconds] * 6 + [seconds[:16]]))  # 160 rows; which 16 come a seventh time is left to chance
    best = 1 - by_length.sum() / (8 * by_length.reshape(20, 8).max(axis=1).sum())
    assert list(tones.padding) == [1, 20]
    assert tones.padding[20] == pytest.approx(best, abs=0.02)
    assert tones.padding[1] > 3 * tones.padding[20]
    assert tones.samples_per_second > 0
    assert tones.bad == 0


def test_the_page_shows_samples_and_what_augmentation_does(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = validate(Run, settings(tmp_path, data))
    model = build_model(run)
    html = html_page(run, model, survey(run, model, measure_s=0.1))
    page = Page(html).root
    sections = {node.attributes["id"]: node for node in page.all("section")}
    assert set(sections) == {"image_text", "speech_text"}
    for name, section in sections.items():
        cards = section.all(class_="card")
        assert len(cards) == (12 if name == "image_text" else 8)
        for card in cards:
            assert len(card.all("img")) == 4  # as it is, and augmented three times
            assert len({image.attributes["src"] for image in card.all("img")}) > 1
            assert len(card.all("audio")) == (name == "speech_text")
            assert card.all("p", class_="text")[0].text.startswith("a ")
    addresses = [node.attributes["src"] for node in [*page.all("img"), *page.all("audio")]]
    assert all(address.startswith("data:") for address in addresses)
    assert not page.all("script")
    assert "Content-Security-Policy" in html


def test_tars_without_an_index_are_shown_as_far_as_is_known(
    tmp_path: Path, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run(tmp_path, data[0])
    values["pair_kinds"]["image_text"]["sources"]["squares"]["name"] = "tars"
    run = validate(Run, values)
    model = build_model(run)
    (kind,) = survey(run, model, measure_s=0.1)
    assert (kind.sources[0].samples, kind.sources[0].rows, kind.sources[0].epochs, kind.padding) == (None, None, None, {})
    assert "have no index" in capsys.readouterr().err
    assert "not known" in html_page(run, model, [kind])


def test_the_command_prints_and_writes_where_it_is_told(tmp_path: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config, page = tmp_path / "run.yaml", tmp_path / "look.html"
    config.write_text(yaml.safe_dump(settings(tmp_path, data)))
    monkeypatch.setattr(sys, "argv", ["clipscale", "data", str(config), "--page", str(page), "--seconds", "0.1"])
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "image_text: 40 global batches of 12" in printed.getvalue()
    assert "samples/s in one process" in printed.getvalue()
    assert page.read_text().startswith("<!doctype html>")
    assert not (tmp_path / "tiny").exists()
