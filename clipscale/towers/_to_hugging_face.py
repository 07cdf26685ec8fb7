"""To transformers: open_clip's own ViT and text transformer as a CLIPModel, with tokenizer and image processor.

transformers' CLIP is one architecture: class token, norms before and after, causal text pooled at the end-of-text token. Whatever
open_clip can make beyond that is refused by name. The layers are the same; names differ, and attention's three matrices stand apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput
from clipscale.towers._hugging_face import quiet
from clipscale.towers._to_open_clip import Trained, check_open_clip, model_config

_ONLY = {"ls_init_value": None, "block_type": None, "final_ln_after_pool": False, "norm_kwargs": None, "act_kwargs": None}
_ONLY_IMAGE = {**_ONLY, "attentional_pool": False, "no_ln_pre": False, "pool_type": "tok"}
_ONLY_TEXT = {**_ONLY, "embed_cls": False, "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear"}
_SWITCHES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_hugging_face(trained: Trained, folder: Path) -> None:
    """Write configuration, weights, tokenizer and image processor.

    Raises:
        RequestError: transformers' CLIP has no place for something of the model.
    """
    image, text = check_open_clip(trained.image, trained.text)
    visual: Any = trained.modules["image"].visual
    words: Any = trained.modules["text"].text
    gelus = {bool(model_config(tower.architecture).get("quick_gelu")) for tower in (image, text)}
    activation = "quick_gelu" if gelus == {True} else "gelu"
    configs = model_config(image.architecture)["vision_cfg"], model_config(text.architecture)["text_cfg"]
    _check(visual, words, *configs, trained, num_gelus=len(gelus))
    tokenizer = trained.modules["text"].input.tokenize.tokenizer  # type: ignore[union-attr]
    config = transformers.CLIPConfig(
        projection_dim=len(trained.projections["image"]),
        vision_config={**_sizes(visual.transformer), "hidden_act": activation, "image_size": visual.image_size[0],
                       "patch_size": visual.patch_size[0]},
        text_config={**_sizes(words.transformer), "hidden_act": activation, "vocab_size": words.vocab_size,
                     "max_position_embeddings": words.num_pos, "bos_token_id": tokenizer.sot_token_id,
                     "eos_token_id": tokenizer.eot_token_id, "pad_token_id": tokenizer.eot_token_id},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    weights = _weights(trained, visual, words)
    missing = {name for name, _ in model.named_parameters()} ^ set(weights)
    assert not missing, f"names differ from transformers': {sorted(missing)[:5]}"
    model.load_state_dict(weights, strict=False, assign=True)  # position numbers are buffers that are not saved
    with quiet():
        model.save_pretrained(folder)
    _tokenizer(tokenizer, words.num_pos).save_pretrained(folder)
    _image_processor(trained.modules["image"].input).save_pretrained(folder)


def _check(
    visual: nn.Module,
    words: nn.Module,
    vision_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    trained: Trained,
    *,
    num_gelus: int,
) -> None:
    tokenizer = trained.modules["text"].input.tokenize.tokenizer  # type: ignore[union-attr]
    picture = trained.modules["image"].input
    problems = [f"vision_cfg.{setting}" for setting in _beyond(vision_config, _ONLY_IMAGE)]
    problems += [f"text_cfg.{setting}" for setting in _beyond(text_config, _ONLY_TEXT)]
    if not isinstance(visual, VisionTransformer):
        problems.append(f"an image tower of kind {type(visual).__name__}")
    if not isinstance(words, TextTransformer):
        problems.append(f"a text tower of kind {type(words).__name__}")
    if not isinstance(tokenizer, SimpleTokenizer) or getattr(tokenizer, "reduction_fn", None) is not None:
        problems.append("a tokenizer other than CLIP's")
    if num_gelus > 1:
        problems.append("QuickGELU in one tower only")
    if trained.bias is not None:
        problems.append("a logit bias")
    if isinstance(picture, ImageInput) and picture.fit == "pad":
        problems.append("pictures padded to squares")
    if problems:
        raise RequestError(f"transformers' CLIP has no place for {', '.join(problems)}; export with --to open_clip")


def _beyond(config: Mapping[str, Any], only: Mapping[str, Any]) -> list[str]:
    """Settings that leave transformers' CLIP."""
    changed = [f"{name} {config[name]}" for name, value in only.items() if config.get(name, value) != value]
    return changed + [name for name in _SWITCHES if config.get(name)]


def _sizes(transformer: Any) -> dict[str, int]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
    }


def _weights(trained: Trained, visual: Any, words: Any) -> dict[str, Tensor]:
    image, text = trained.projections["image"], trained.projections["text"]
    weights = {
        "logit_scale": torch.tensor(math.log(trained.scale)),
        "visual_projection.weight": image @ visual.proj.T,
        "text_projection.weight": text @ words.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": words.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": words.positional_embedding,
        **_renamed(visual.ln_pre, "vision_model.pre_layrnorm"),
        **_renamed(visual.ln_post, "vision_model.post_layernorm"),
        **_renamed(words.ln_final, "text_model.final_layer_norm"),
    }
    for half, transformer in (("vision_model", visual.transformer), ("text_model", words.transformer)):
        for number, block in enumerate(transformer.resblocks):
            weights |= _block(block, f"{half}.encoder.layers.{number}")
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def _block(block: Any, place: str) -> dict[str, Tensor]:
    attention = f"{place}.self_attn"
    thirds = {
        f"{attention}.{name}_proj.{part}": value
        for part in ("weight", "bias")
        for name, value in zip("qkv", getattr(block.attn, f"in_proj_{part}").chunk(3), strict=True)
    }
    return {
        **thirds,
        **_renamed(block.attn.out_proj, f"{attention}.out_proj"),
        **_renamed(block.ln_1, f"{place}.layer_norm1"),
        **_renamed(block.ln_2, f"{place}.layer_norm2"),
        **_renamed(block.mlp.c_fc, f"{place}.mlp.fc1"),
        **_renamed(block.mlp.c_proj, f"{place}.mlp.fc2"),
    }


def _renamed(layer: nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for part, value in layer.named_parameters()}


def _tokenizer(tokenizer: Any, context_length: int) -> Any:
    """CLIP's byte pairs under the names that transformers has for its special tokens."""
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in tokenizer.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(tokenizer.bpe_ranks), model_max_length=context_length)


def _image_processor(picture: Any) -> Any:
    side = {"height": picture.size, "width": picture.size}
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": picture.size} if picture.fit == "crop" else side,
        crop_size=side,
        do_center_crop=picture.fit == "crop",
        resample=_RESAMPLE[picture.interpolation],
        image_mean=list(picture.mean),
        image_std=list(picture.std),
    )
