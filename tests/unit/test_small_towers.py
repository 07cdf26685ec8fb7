"""conv_image and log_mel_transformer: sizes, positions and what the convolutions see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from clipscale.inputs import ImageInput, SpeechInput
from clipscale.towers import Tower
from clipscale.towers._transformer import TransformerBlock, masked_mean, sinusoids, valid_positions


def build(name: str, **settings: Any) -> Any:
    return Tower.model_validate({"name": name, **settings}).build().eval()


def test_a_block_equals_torch_own_pre_norm_encoder_layer() -> None:
    block = TransformerBlock(16, heads=4, mlp_ratio=2.0, dropout=0.0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    attention = block.attention
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (attention.query, attention.key, attention.value)]
            getattr(layer.self_attn, f"in_proj_{kind}").copy_(torch.cat(parts))
            for ours, theirs in (
                (attention.output, layer.self_attn.out_proj),
                (block.attention_norm, layer.norm1),
                (block.mlp_norm, layer.norm2),
                (block.mlp[0], layer.linear1),
                (block.mlp[2], layer.linear2),
            ):
                getattr(theirs, kind).copy_(getattr(ours, kind))
    x, valid = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True, True, False, False, False]])
    expected = layer(x, src_key_padding_mask=~valid)
    assert_close(block(x, valid)[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_masked_mean_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, math.nan]]])
    assert masked_mean(x, valid_positions(torch.tensor([2]), 3)).tolist() == [[2.0, 3.0]]
    assert masked_mean(x, valid_positions(torch.tensor([0]), 3)).tolist() == [[1.0, 2.0]]


def test_positions_are_sines_and_cosines_of_falling_rates() -> None:
    table = sinusoids(50, 4, device=torch.device("cpu"))
    assert_close(table[7], torch.tensor([math.sin(7.0), math.sin(0.07), math.cos(7.0), math.cos(0.07)]))


@pytest.mark.parametrize(("stem", "tokens"), [([2, 2], 25), ([1], 99), ([4], 25), ([2, 2, 3], 9)])
def test_the_stem_shortens_recordings_by_its_strides(stem: list[int], tokens: int) -> None:
    tower = build("log_mel_transformer", num_mels=8, width=8, layers=1, heads=2, stem=stem)
    x, valid = tower._embed(torch.randn(1, 8, 99), torch.tensor([99]))
    assert x.shape == (1, tokens, 8)
    assert valid.all()


def test_tokens_of_a_padded_recording_are_those_of_the_recording() -> None:
    tower = build("log_mel_transformer", num_mels=8, width=8, layers=1, heads=2)
    padded = torch.randn(1, 8, 40)
    for length in (1, 2, 3, 7, 8, 21):
        together, valid = tower._embed(padded, torch.tensor([length]))
        alone, _ = tower._embed(padded[:, :, :length], torch.tensor([length]))
        assert valid.sum() == alone.shape[1] == math.ceil(length / 4)
        assert_close(together[:, : alone.shape[1]], alone)


def test_towers_ask_for_the_input_they_were_made_for() -> None:
    speech = build("log_mel_transformer", num_mels=24, width=8, layers=1, heads=2, max_seconds=2.5)
    assert speech.input == SpeechInput(2.5, num_mels=24)
    assert build("conv_image", image_size=28).input == ImageInput(28)


@pytest.mark.parametrize(("size", "channels", "tokens"), [(32, [8, 8], 64), (28, [8, 8], 49), (9, [8], 25), (8, [4], 16)])
def test_each_stage_halves_the_picture(size: int, channels: list[int], tokens: int) -> None:
    tower = build("conv_image", image_size=size, channels=channels, width=8, layers=1, heads=2)
    assert tower.positions.shape == (tokens, 8)
    assert tower({"pixels": torch.randn(2, 3, size, size)}).shape == (2, 8)


@pytest.mark.parametrize("name", ["conv_image", "log_mel_transformer"])
def test_heads_must_divide_the_width(name: str) -> None:
    with pytest.raises(ValidationError, match="width 30 is not a multiple of heads 4"):
        build(name, width=30, heads=4)


def test_channels_and_strides_start_at_one() -> None:
    with pytest.raises(ValidationError, match="channels must be at least 1"):
        build("conv_image", channels=[8, 0])
    with pytest.raises(ValidationError, match="stem strides must be at least 1"):
        build("log_mel_transformer", stem=[0])
