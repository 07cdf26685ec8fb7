"""fp8: which layers multiply in float8, how near bf16 they stay, and what is refused. Emulated: no GPU is needed."""

from __future__ import annotations

import torch
from torch import nn

from clipscale.model import build_encoders
from clipscale.towers import Tower
from clipscale.towers._float8 import use_float8
from clipscale.towers._module import TowerModule

SPEECH = {"name": "log_mel_transformer", "width": 64, "layers": 2, "heads": 4, "num_mels": 16, "max_seconds": 0.5}


def tower(**settings: object) -> TowerModule:
    made = Tower.model_validate(settings)
    return build_encoders({made.modality: made}, embed_dim=8, pair_kinds={}, seed=0).tower(made.modality).train()


def test_linear_layers_of_blocks_round_to_float8_and_stay_near_bf16_under_the_same_names() -> None:
    plain, rounded = tower(**SPEECH), tower(**SPEECH)
    assert use_float8(rounded, emulate=True) == 2 * 6, "query, key, value, output and the two of the perceptron"
    assert list(rounded.state_dict()) == list(plain.state_dict())
    inputs = {"mel": torch.randn(16, 16, 48, generator=torch.Generator().manual_seed(0)), "length": torch.full((16,), 48)}
    features = []
    for module in (plain, rounded):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features.append(module(inputs).float())
        features[-1].square().sum().backward()
    error = (features[1] - features[0]).norm() / features[0].norm()
    assert 0.005 < error < 0.1, "e4m3 keeps three bits behind the leading one, bf16 seven"
    gradients = [dict(module.named_parameters())["transformer.0.mlp.0.weight"].grad for module in (plain, rounded)]
    assert 0.005 < (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.3


def test_attention_with_packed_weights_and_odd_sides_stay_as_they_are() -> None:
    vit = tower(name="open_clip_image", architecture="ViT-S-32-alt", image_size=64)
    blocks = len(vit.blocks())
    assert use_float8(vit, emulate=True) == 2 * blocks
    assert all(type(block.attn) is nn.MultiheadAttention for block in vit.blocks())
    assert use_float8(tower(**{**SPEECH, "width": 24}), emulate=True) == 0
