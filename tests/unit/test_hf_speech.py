"""hf_speech gives what transformers gives for one recording, and means only what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.testing import assert_close

from clipscale.errors import RequestError
from clipscale.inputs import SpeechInput
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

# transformers' WavLM gives torch a boolean padding mask beside a float position bias
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")

WAVEFORM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
MODELS = {
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
}


def build(**settings: Any) -> TowerModule:
    return Tower.model_validate({"name": "hf_speech", **settings}).build().eval()


def save(kind: str, folder: Path, **more: Any) -> Any:
    """A model of that kind with random weights, saved as transformers saves it."""
    config, model = MODELS[kind]
    torch.manual_seed(0)
    made = model(config(**WAVEFORM, **more)).eval()
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_each_recording_of_a_batch_gives_the_mean_that_transformers_gives_for_it_alone(kind: str, norm: str, tmp_path: Path) -> None:
    original = save(kind, tmp_path, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    tower = build(model=str(tmp_path), max_seconds=0.1)
    waveform, length = torch.randn(3, 1600), [1600, 333, 900]
    features = tower({"waveform": waveform, "length": torch.tensor(length)})
    for row, end in enumerate(length):
        expected = original(waveform[row : row + 1, :end]).last_hidden_state[0].mean(dim=0)
        assert_close(features[row], expected, rtol=1e-4, atol=1e-5)


def test_a_recording_shorter_than_one_frame_counts_as_one() -> None:
    tower = build(config={"model_type": "wav2vec2", **WAVEFORM})
    assert tower({"waveform": torch.randn(2, 7), "length": torch.tensor([7, 0])}).isfinite().all()
    noise, silence = torch.randn(1, 100), torch.zeros(1, 100)
    noise[:, :7] = silence[:, :7] = torch.randn(7)
    length = torch.tensor([7])
    assert torch.equal(tower({"waveform": noise, "length": length}), tower({"waveform": silence, "length": length}))


@pytest.mark.parametrize("normalise", [True, False])
def test_waveforms_are_normalised_as_the_model_files_say(tmp_path: Path, normalise: bool) -> None:
    save("wav2vec2", tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(tmp_path)
    tower = build(model=str(tmp_path))
    assert isinstance(tower.input, SpeechInput)
    assert tower.input.normalise_waveform is normalise
    other = build(model=str(tmp_path), normalise_waveform=not normalise)
    assert isinstance(other.input, SpeechInput)
    assert other.input.normalise_waveform is not normalise


def test_whisper_means_the_frames_that_were_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)).eval()
    whisper.save_pretrained(tmp_path)
    tower = build(model=str(tmp_path), max_seconds=1.0)
    mel = torch.randn(2, 8, 100)
    hidden = whisper.encoder(mel).last_hidden_state
    features = tower({"mel": mel, "length": torch.tensor([100, 31])})
    assert_close(features[0], hidden[0].mean(dim=0))
    assert_close(features[1], hidden[1, :16].mean(dim=0))  # 31 frames make 16 tokens
    assert tower.input == SpeechInput(1.0, features="whisper_log_mel", num_mels=8, pad_to_max=True)
    assert not any(name.startswith("decoder") for name, _ in tower.named_parameters())


def test_a_shortened_whisper_keeps_the_first_positions() -> None:
    torch.manual_seed(0)
    whole = build(config={"model_type": "whisper", **WHISPER}, max_seconds=1.0)
    short = build(config={"model_type": "whisper", **WHISPER}, max_seconds=0.5)
    assert torch.equal(short.encoder.embed_positions.weight, whole.encoder.embed_positions.weight[:25])  # type: ignore[union-attr, index]
    assert short({"mel": torch.randn(1, 8, 50), "length": torch.tensor([50])}).shape == (1, 32)
    assert isinstance(short.input, SpeechInput)
    assert short.input.max_seconds == 0.5


def test_more_seconds_than_whisper_has_positions_is_refused() -> None:
    with pytest.raises(RequestError, match=r"max_seconds 30.0 does not fit this Whisper encoder: it takes 0.02 to 1.0 seconds"):
        build(config={"model_type": "whisper", **WHISPER})


def test_transformers_own_random_layer_skipping_and_masking_are_off() -> None:
    noisy = {"layerdrop": 0.9, "mask_time_prob": 0.9, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    tower = build(config={"model_type": "wav2vec2", **WAVEFORM, **noisy, "feat_proj_dropout": 0.0}).train()
    inputs = {"waveform": torch.randn(1, 1600), "length": torch.tensor([1600])}
    assert torch.equal(tower(inputs), tower(inputs))


def test_a_model_of_another_kind_is_refused() -> None:
    bert = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "vocab_size": 8,
    }
    with pytest.raises(RequestError, match="takes models of type whisper, wav2vec2, hubert, wavlm; found 'bert'"):
        build(config=bert)


def test_either_weights_or_a_configuration_are_needed() -> None:
    with pytest.raises(ValidationError, match="give either `model`"):
        build()


def test_a_configuration_file_serves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert", **WAVEFORM}))
    assert build(config=str(tmp_path)).embed_dim == 32
