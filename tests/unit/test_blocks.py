"""Which weights count as blocks, and which as standing after them, in other libraries' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
from small_models import write_tokenizer
from torch import nn

from clipscale.towers import Tower
from clipscale.towers._blocks import flatten_stages, largest_block_list, standing_after

ARCHITECTURES = Path(__file__).parents[1] / "contracts" / "towers" / "architectures"
SMALL_BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
SMALL_WAVEFORM = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [64, 64],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 4,
}
SMALL_WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


@pytest.mark.parametrize(
    ("settings", "blocks", "after"),
    [
        ({"name": "open_clip_image", "architecture": "tiny-vit"}, 3, {"visual.ln_post", "visual.proj"}),
        ({"name": "open_clip_image", "architecture": "tiny-resnet"}, 10, {"visual.attnpool"}),
        # ConvNeXt-Atto: 2 + 2 + 6 + 2 blocks, and a downsampling before each stage but the first
        ({"name": "open_clip_image", "architecture": "tiny-convnext"}, 15, {"visual.trunk.head", "visual.head"}),
        ({"name": "open_clip_text", "architecture": "tiny-vit"}, 3, {"text.ln_final", "text.text_projection"}),
        ({"name": "hf_text", "config": {"model_type": "bert", **SMALL_BERT}}, 2, set()),
        ({"name": "hf_text", "config": {"model_type": "gpt2", **SMALL_GPT}}, 2, {"encoder.ln_f"}),
        ({"name": "hf_speech", "config": {"model_type": "whisper", **SMALL_WHISPER}}, 2, {"encoder.layer_norm"}),
        ({"name": "hf_speech", "config": {"model_type": "wav2vec2", **SMALL_WAVEFORM}}, 3, set()),
        (
            {"name": "hf_speech", "config": {"model_type": "wav2vec2", **SMALL_WAVEFORM, "do_stable_layer_norm": True}},
            3,
            {"encoder.encoder.layer_norm"},
        ),
    ],
)
def test_blocks_are_counted_and_what_stands_after_them_is_named(
    settings: dict[str, Any], blocks: int, after: set[str], tmp_path: Path
) -> None:
    for architecture in ARCHITECTURES.glob("*.json"):
        open_clip.add_model_config(architecture)
    more = {"tokenizer": str(write_tokenizer(tmp_path)), "context_length": 16} if settings["name"] == "hf_text" else {}
    tower = Tower.model_validate({**settings, **more}).build()
    assert len(tower.blocks()) == blocks
    mine = {
        id(parameter) for part in tower.after_blocks() for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    names = [name for name, parameter in tower.named_parameters() if id(parameter) in mine]
    assert {next((end for end in after if name == end or name.startswith(f"{end}.")), name) for name in names} == after


def test_the_largest_module_list_is_the_blocks() -> None:
    model = nn.ModuleDict({"stem": nn.ModuleList([nn.Linear(2, 2)]), "body": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(9, 9)])})})
    assert largest_block_list(model) == "body.layers"
    assert largest_block_list(nn.Linear(2, 2)) == ""


def test_what_is_registered_later_at_any_level_stands_after_and_so_does_a_final_norm() -> None:
    body = nn.ModuleDict(
        {"norm": nn.LayerNorm(2), "embed": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2)]), "pool": nn.Linear(2, 1)}
    )
    body["relative_positions"] = nn.Embedding(3, 2)  # as in MPNet and DeBERTa: not after the blocks, but used by each
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "body": body, "head": nn.Linear(1, 1)})
    assert standing_after(model, "body.layers") == [model["head"], body["norm"], body["pool"]]


def test_stages_are_opened_to_their_blocks() -> None:
    first = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)))
    second = nn.Module()
    second.downsample, second.blocks, second.drop = nn.Linear(2, 2), nn.Sequential(nn.Sequential(nn.Linear(2, 2))), nn.Identity()
    plain = nn.Linear(2, 2)
    expected = [first[0], first[1], second.downsample, second.blocks[0], plain]
    assert flatten_stages(nn.ModuleList([first, second, plain])) == expected
