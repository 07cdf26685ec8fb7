"""Models that others wrote are opened as they are, or refused: held against open_clip's and transformers' own functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
import yaml
from foreign_models import (
    CAPTIONS,
    add_architecture,
    open_clip_model,
    write_clap_folder,
    write_clip_folder,
    write_open_clip_folder,
    write_siglip_folder,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import write_squares
from torch.nn.functional import normalize
from torch.testing import assert_close

from clipscale.errors import RequestError, RunFolderError
from clipscale.evaluate import evaluate_checkpoint
from clipscale.foreign import foreign_format, open_foreign
from clipscale.inputs import ImageInput
from clipscale.model import Encoders, prepare
from clipscale.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return add_architecture(tmp_path_factory.mktemp("architectures"), "foreign-clip")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip_folder(folder)
    return folder


def texts(model: Encoders, captions: list[str] = CAPTIONS) -> torch.Tensor:
    with torch.no_grad():
        return model.encode("text", model.inputs()["text"].tokenize(captions))  # type: ignore[union-attr]


def images(model: Encoders, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encode("image", prepare("image", model.inputs()["image"], {"pixels": pixels}))


def unit(features: Any) -> torch.Tensor:
    return normalize(getattr(features, "pooler_output", features).detach(), dim=1)


def bytes_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_an_open_clip_folder_gives_open_clips_embeddings_with_its_own_preparation(architecture: str, tmp_path: Path) -> None:
    model = open_clip_model(architecture)
    folder = write_open_clip_folder(tmp_path / "model", model, architecture)
    opened = open_foreign(f"local-dir:{folder}").model
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in bytes_of()]
    assert_close(images(opened, bytes_of()), unit(theirs.eval().encode_image(torch.stack([transform(picture) for picture in pictures]))))
    assert_close(texts(opened), unit(theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS))))
    assert float(opened.log_scale["image_text"].exp().detach()) == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_file_of_weights_needs_its_architecture_or_the_note_of_open_clips_training(architecture: str, tmp_path: Path, form: str) -> None:
    model = open_clip_model(architecture, seed=5)
    file = tmp_path / "checkpoints" / f"epoch_3.{form}"
    file.parent.mkdir()
    if form == "pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, file)
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    with pytest.raises(RequestError, match="give --architecture NAME"):
        open_foreign(file)
    expected = unit(model.encode_text(open_clip.get_tokenizer(architecture)(CAPTIONS)))
    assert_close(texts(open_foreign(file, architecture=architecture).model), expected)
    (tmp_path / "params.txt").write_text(f"lr: 0.001\nmodel: {architecture}\nmodel_ema: 3\n")
    assert_close(texts(open_foreign(file).model), expected)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_clip_folder, write_siglip_folder])
def test_a_hugging_face_folder_gives_transformers_embeddings(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    model = write(tmp_path)
    opened = open_foreign(tmp_path).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    siglip = model.config.model_type == "siglip"
    encoded = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")
    asked = {"input_ids": encoded["input_ids"]} if siglip else dict(encoded)
    asked.pop("token_type_ids", None)
    assert_close(texts(opened), unit(model.get_text_features(**asked)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in bytes_of()]
    assert_close(images(opened, bytes_of()), unit(model.get_image_features(**processor(pictures, return_tensors="pt"))))
    assert float(opened.log_scale["image_text"].exp().detach()) == pytest.approx(math.exp(model.logit_scale.item()), rel=1e-6)
    assert (opened.bias["image_text"].item() if "image_text" in opened.bias else None) == (-7.0 if siglip else None)


def test_preparation_comes_from_the_folders_processor(clip_folder: Path, tmp_path: Path) -> None:
    assert open_foreign(clip_folder).model.inputs()["image"] == ImageInput(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", "crop")
    write_siglip_folder(tmp_path)
    assert open_foreign(tmp_path).model.inputs()["image"] == ImageInput(16, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")


def test_a_clap_folder_gives_transformers_embeddings_and_the_same_ones_each_time(tmp_path: Path) -> None:
    model = write_clap_folder(tmp_path)
    opened = open_foreign(tmp_path).model
    waves = [np.random.default_rng(seed).normal(0, 0.1, 30_000 + 5_000 * seed).astype(np.float32) for seed in range(3)]
    extractor = transformers.ClapFeatureExtractor.from_pretrained(tmp_path)
    extracted = extractor(waves, sampling_rate=48_000, return_tensors="pt")
    longer = torch.zeros(3, 1, dtype=torch.bool)
    expected = unit(model.get_audio_features(input_features=extracted["input_features"], is_longer=longer))
    batch = {"waveform": torch.zeros(3, 40_000), "length": torch.tensor([len(wave) for wave in waves])}
    for row, wave in enumerate(waves):
        batch["waveform"][row, : len(wave)] = torch.from_numpy(wave)
    with torch.no_grad():
        assert_close(opened.encode("speech", prepare("speech", opened.inputs()["speech"], batch)), expected)
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt")
    asked = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    assert_close(texts(opened), unit(model.get_text_features(**asked)))


# --- what is refused --------------------------------------------------------------------------------------------------


def _copied(folder: Path, to: Path, **changes: Any) -> Path:
    """The folder again, with settings of one of its files changed: `config__text_config__eos_token_id=1`."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    for place, value in changes.items():
        file, *keys, last = place.split("__")
        values = json.loads((to / f"{file}.json").read_text())
        inner = values
        for key in keys:
            inner = inner[key]
        inner[last] = value
        (to / f"{file}.json").write_text(json.dumps(values))
    return to


def test_text_that_is_pooled_at_a_token_no_caption_has_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = _copied(clip_folder, tmp_path / "wrong", config__text_config__eos_token_id=30)
    with pytest.raises(RequestError, match="text: different samples get the same embedding; the wrong token is pooled"):
        open_foreign(folder)


def test_weights_that_are_missing_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = _copied(clip_folder, tmp_path / "less")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks 1 weights .* text_projection.weight"):
        open_foreign(folder)


def test_weights_that_are_no_numbers_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = _copied(clip_folder, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match="image: embeddings are not finite vectors"):
        open_foreign(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessor_config__size": {"shortest_edge": 20}}, "only bilinear or bicubic and square"),
        ({"preprocessor_config__resample": 0}, "only bilinear or bicubic and square"),
        ({"preprocessor_config__do_normalize": False}, "not scaled to"),
        ({"config__model_type": "bert"}, "holds a model of type 'bert'; models of type clip, siglip, clap"),
    ],
)
def test_what_cannot_be_prepared_as_asked_is_refused(clip_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_foreign(_copied(clip_folder, tmp_path / "changed", **changes))


def test_a_folder_of_neither_library_is_none_of_theirs(tmp_path: Path) -> None:
    assert foreign_format(tmp_path) is None
    with pytest.raises(RequestError, match="no checkpoint of open_clip's"):
        open_foreign(tmp_path)


# --- the command's function -------------------------------------------------------------------------------------------


def test_a_foreign_model_is_evaluated_on_a_data_set_of_ours(clip_folder: Path, tmp_path: Path) -> None:
    squares = write_squares(tmp_path, samples=12)
    source = {"name": "shards", "url": str(squares)}
    asked = {"evaluations": {"colours": {"name": "zero_shot_classification", "source": source, "templates": ["a {} cat"]}}}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(asked))
    with pytest.raises(RunFolderError, match="give --output FOLDER"):
        evaluate_checkpoint(clip_folder, Mesh.single(), files=[tmp_path / "judge.yaml"], overrides=[], output=None)
    folder = evaluate_checkpoint(clip_folder, Mesh.single(), files=[tmp_path / "judge.yaml"], overrides=[], output=tmp_path / "out")
    result = json.loads((folder / "evaluation.json").read_text())["colours"]
    assert (result["figures"][0]["n"], result["provenance"]["format"]) == (12, "hugging_face")
