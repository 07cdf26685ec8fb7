"""Encoders: towers, projections and temperatures joined; what is locked, cached, seeded and held."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_models import write_tokenizer
from torch import Tensor
from torch.testing import assert_close

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, Modality, SpeechInput, TextInput
from clipscale.model import Encoders, PairKindModel, build_encoders, prepare
from clipscale.towers import Tower

KINDS = {
    "image_text": PairKindModel(("image", "text"), init_scale=10.0),
    "speech_text": PairKindModel(("speech", "text"), init_scale=20.0, max_scale=50.0, init_bias=-10.0),
}
BERT = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.5,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def tower(name: str, **settings: Any) -> Tower:
    return Tower.model_validate({"name": name, **settings})


def text_tower(tokenizer: str, **settings: Any) -> Tower:
    return tower("hf_text", config=BERT, tokenizer=tokenizer, context_length=16, **settings)


def towers(tokenizer: str, **text: Any) -> dict[Modality, Tower]:
    return {
        "image": tower("conv_image", image_size=8, channels=[4], width=8, layers=1, heads=2),
        "speech": tower("log_mel_transformer", num_mels=8, width=8, layers=1, heads=2, max_seconds=1.0),
        "text": text_tower(tokenizer, **text),
    }


def build(tokenizer: str, *, seed: int = 0, kinds: dict[str, PairKindModel] | None = None, **text: Any) -> Encoders:
    return build_encoders(towers(tokenizer, **text), embed_dim=6, pair_kinds=KINDS if kinds is None else kinds, seed=seed)


def batch(model: Encoders, captions: list[str]) -> dict[Modality, dict[str, Tensor]]:
    """Prepared inputs of all three modalities."""
    generator = torch.Generator().manual_seed(len(captions))
    count = len(captions)
    text_input = model.inputs()["text"]
    assert isinstance(text_input, TextInput)
    return {
        "image": {"pixels": torch.randn(count, 3, 8, 8, generator=generator)},
        "speech": {"mel": torch.randn(count, 8, 50, generator=generator), "length": torch.tensor([50, 20, 5][:count])},
        "text": text_input.tokenize(captions),
    }


def both_kinds(model: Encoders, captions: list[str]) -> dict[str, dict[Modality, dict[str, Tensor]]]:
    inputs = batch(model, captions)
    return {
        "image_text": {"image": inputs["image"], "text": inputs["text"]},
        "speech_text": {"speech": inputs["speech"], "text": inputs["text"]},
    }


CAPTIONS = ["a cat", "two dogs run at night", "seven"]


def test_every_kind_due_is_encoded_in_one_pass(tokenizer: str) -> None:
    model = build(tokenizer).eval()
    inputs = batch(model, CAPTIONS)
    outputs = model(both_kinds(model, CAPTIONS))
    assert list(outputs) == ["image_text", "speech_text"]
    assert_close(outputs["image_text"].x, model.encode("image", inputs["image"]))
    assert_close(outputs["speech_text"].x, model.encode("speech", inputs["speech"]))
    assert_close(outputs["speech_text"].y, model.encode("text", inputs["text"]))
    assert outputs["image_text"].bias is None
    assert outputs["image_text"].guide_y is None
    assert set(model({"image_text": {"image": inputs["image"], "text": inputs["text"]}})) == {"image_text"}


def test_an_embedding_is_the_projected_feature_divided_by_its_length(tokenizer: str) -> None:
    model = build(tokenizer).eval()
    inputs = batch(model, CAPTIONS)["image"]
    projected = model.features("image", inputs) @ model.projections["image"].weight.T
    expected = projected / projected.pow(2).sum(dim=1, keepdim=True).sqrt()
    assert_close(model.encode("image", inputs), expected)


def test_scale_and_bias_start_where_they_are_told(tokenizer: str) -> None:
    model = build(tokenizer)
    outputs = model(both_kinds(model, CAPTIONS))
    assert outputs["image_text"].scale.shape == (1,)
    assert outputs["image_text"].scale.item() == pytest.approx(10.0)
    assert outputs["speech_text"].scale.item() == pytest.approx(20.0)
    assert outputs["speech_text"].bias is not None
    assert outputs["speech_text"].bias.item() == -10.0


def test_a_scale_beyond_its_limit_is_held_there_and_can_come_back(tokenizer: str) -> None:
    model = build(tokenizer)
    parameter = model.log_scale["speech_text"]
    with torch.no_grad():
        parameter.fill_(math.log(1000.0))
    scale = model(both_kinds(model, CAPTIONS))["speech_text"].scale
    assert scale.item() == pytest.approx(50.0, rel=1e-5)
    scale.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(50.0, rel=1e-5)  # d exp(v) / dv, not the zero of a clamped scale


def test_embeddings_are_fp32_when_towers_compute_in_bf16(tokenizer: str) -> None:
    model = build(tokenizer, locked=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(both_kinds(model, CAPTIONS))["speech_text"]
    assert {output.x.dtype, output.y.dtype, output.scale.dtype} == {torch.float32}
    assert_close(output.x.norm(dim=1), torch.ones(3))


def test_a_model_in_double_precision_stays_in_it(tokenizer: str) -> None:
    model = build(tokenizer).double()
    inputs = batch(model, CAPTIONS)["image"]
    assert model.encode("image", {"pixels": inputs["pixels"].double()}).dtype == torch.float64


def test_a_wholly_locked_tower_guides_and_only_its_projection_trains(tokenizer: str) -> None:
    model = build(tokenizer, locked=True)
    inputs = both_kinds(model, CAPTIONS)
    output = model(inputs)["speech_text"]
    assert output.guide_x is None
    assert output.guide_y is not None
    assert not output.guide_y.requires_grad
    features = model.features("text", inputs["speech_text"]["text"])
    assert_close(output.guide_y, features / features.norm(dim=1, keepdim=True))
    (output.x * output.y).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "projections.text.weight" in with_gradient
    assert not any(name.startswith("towers.text") for name in with_gradient)


def test_a_partly_locked_tower_gives_no_guide(tokenizer: str) -> None:
    model = build(tokenizer, locked=True, unlocked_blocks=1)
    output = model(both_kinds(model, CAPTIONS))["speech_text"]
    assert output.guide_y is None
    assert output.y.requires_grad


def test_a_locked_tower_draws_no_dropout_in_training(tokenizer: str) -> None:
    model = build(tokenizer, locked=True).train()
    inputs = batch(model, CAPTIONS)["text"]
    assert torch.equal(model.encode("text", inputs), model.encode("text", inputs))
    free = build(tokenizer).train()
    assert not torch.equal(free.encode("text", inputs), free.encode("text", inputs))


def test_cached_features_equal_fresh_ones_and_are_not_computed_again(tokenizer: str) -> None:
    cached, plain = build(tokenizer, locked=True, cached_rows=10), build(tokenizer, locked=True)
    runs: list[int] = []
    cached.towers["text"].register_forward_hook(lambda *_: runs.append(1))
    inputs = batch(plain, [*CAPTIONS])["text"]
    assert_close(cached.encode("text", inputs), plain.encode("text", inputs))
    assert len(runs) == 3
    swapped = batch(plain, ["seven", "a cat", "seven"])["text"]
    assert_close(cached.encode("text", swapped), plain.encode("text", swapped))
    assert len(runs) == 3


def test_cached_features_do_not_depend_on_the_batch_they_came_first_in(tokenizer: str) -> None:
    one, other = build(tokenizer, locked=True, cached_rows=10), build(tokenizer, locked=True, cached_rows=10)
    short, long = batch(one, ["a cat", "seven"])["text"], batch(one, ["two dogs run over the wide green field at night", "a cat"])["text"]
    one.encode("text", short)
    shapes: list[list[int]] = []
    other.towers["text"].register_forward_pre_hook(lambda _, inputs: shapes.append(list(inputs[0]["tokens"].shape)))
    assert torch.equal(one.features("text", long), other.features("text", long))
    assert shapes == [[1, 12], [1, 4]]  # alone, and without padding: [CLS] a cat [SEP]


def test_evaluation_encodes_captions_as_a_batch_past_the_cache(tokenizer: str) -> None:
    cached, plain = build(tokenizer, locked=True, cached_rows=10).eval(), build(tokenizer, locked=True).eval()
    runs: list[int] = []
    cached.towers["text"].register_forward_hook(lambda *_: runs.append(1))
    inputs = batch(plain, CAPTIONS)["text"]
    assert torch.equal(cached.encode("text", inputs), plain.encode("text", inputs))
    assert len(runs) == 1


def test_the_cache_forgets_the_least_recently_used_caption(tokenizer: str) -> None:
    model = build(tokenizer, locked=True, cached_rows=2)
    runs: list[int] = []
    model.towers["text"].register_forward_hook(lambda *_: runs.append(1))
    for captions, encoded in ((["a cat", "seven"], 2), (["a cat"], 2), (["two dogs"], 3), (["a cat"], 3), (["seven"], 4)):
        model.encode("text", batch(model, captions)["text"])
        assert len(runs) == encoded, captions


def test_loading_other_weights_empties_the_cache(tokenizer: str) -> None:
    model, other = build(tokenizer, locked=True, cached_rows=10), build(tokenizer, seed=1, locked=True)
    inputs = batch(model, CAPTIONS)["text"]
    model.encode("text", inputs)
    model.load_state_dict(other.state_dict())
    assert_close(model.encode("text", inputs), other.encode("text", inputs))


def test_a_cache_for_a_tower_that_trains_is_refused(tokenizer: str) -> None:
    with pytest.raises(ValidationError, match="cached_rows needs `locked: true`"):
        text_tower(tokenizer, cached_rows=10)
    with pytest.raises(ValidationError, match="cached_rows needs `locked: true`"):
        text_tower(tokenizer, cached_rows=10, locked=True, unlocked_blocks=1)


def test_unlocking_blocks_of_a_tower_that_is_not_locked_is_refused() -> None:
    with pytest.raises(ValidationError, match="unlocked_blocks needs `locked: true`"):
        tower("conv_image", unlocked_blocks=1)


def test_another_tower_or_pair_kind_changes_no_weight_of_the_others(tokenizer: str) -> None:
    alone = build_encoders({"image": towers(tokenizer)["image"]}, embed_dim=6, pair_kinds={}, seed=3).state_dict()
    together = build(tokenizer, seed=3).state_dict()
    other_seed = build(tokenizer, seed=4).state_dict()
    assert set(alone) <= set(together)
    assert all(torch.equal(weight, together[name]) for name, weight in alone.items())
    assert not torch.equal(together["projections.image.weight"], other_seed["projections.image.weight"])
    assert not torch.equal(together["towers.image.positions"], other_seed["towers.image.positions"])


def test_building_leaves_the_random_state_as_it_was(tokenizer: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tokenizer)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_keys_begin_with_what_they_belong_to(tokenizer: str) -> None:
    names = [name for name, _ in build(tokenizer).named_parameters()]
    assert {name.split(".")[0] for name in names} == {"towers", "projections", "log_scale", "bias"}
    assert {"projections.text.weight", "log_scale.image_text", "bias.speech_text", "towers.speech.norm.weight"} <= set(names)


def test_a_modality_without_tower_is_named(tokenizer: str) -> None:
    model = build_encoders({"image": towers(tokenizer)["image"]}, embed_dim=6, pair_kinds={}, seed=0)
    with pytest.raises(RequestError, match="the model has no speech tower; it encodes image"):
        model.encode("speech", {})


def test_preparing_normalises_pixels_and_makes_log_mel_frames(tokenizer: str) -> None:
    inputs = build(tokenizer).inputs()
    assert isinstance(inputs["image"], ImageInput)
    assert isinstance(inputs["speech"], SpeechInput)
    white = prepare("image", inputs["image"], {"pixels": torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)})["pixels"]
    expected = (1 - torch.tensor(inputs["image"].mean)) / torch.tensor(inputs["image"].std)
    assert_close(white[0, :, 0, 0], expected)
    speech = prepare("speech", inputs["speech"], {"waveform": torch.randn(1, 8000), "length": torch.tensor([8000])})
    assert speech["mel"].shape[:2] == (1, 8)
    assert abs(int(speech["length"]) - 50) <= 1  # half a second, a frame each 10 ms
    captions = {"tokens": torch.ones(1, 2), "mask": torch.ones(1, 2)}
    assert prepare("text", inputs["text"], captions) is captions


def test_a_restored_model_gives_the_same_embeddings(tokenizer: str, tmp_path: Path) -> None:
    model, other = build(tokenizer, seed=1).eval(), build(tokenizer, seed=2).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    inputs = batch(model, CAPTIONS)
    for modality in model.modalities:
        assert torch.equal(model.encode(modality, inputs[modality]), other.encode(modality, inputs[modality]))
