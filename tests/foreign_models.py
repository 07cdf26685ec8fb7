"""Small models as open_clip and transformers write them, with random weights; and pictures, captions and recordings to try them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from small_models import write_tokenizer

VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
WORDS = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PREPROCESS = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
CAPTIONS = ["a cat", "two dogs run over the wide green field at night", "seven"]


def add_architecture(folder: Path, name: str, **changes: Any) -> str:
    """An open_clip architecture of this name, from now on in this process."""
    config = {"embed_dim": 12, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": WORDS, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def open_clip_model(name: str, *, seed: int = 0) -> Any:
    """Made by open_clip itself."""
    torch.manual_seed(seed)
    return open_clip.create_model(name).eval()


def write_open_clip_folder(folder: Path, model: Any, name: str) -> Path:
    """As open_clip's push to the hub lays it out."""
    folder.mkdir(parents=True)
    described = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}


def write_clip_folder(folder: Path) -> Any:
    """A CLIPModel with tokenizer and image processor; returns the model."""
    text = {**_TEXT, "max_position_embeddings": 32, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(1)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_IMAGE, projection_dim=12)).eval()
    _processor("CLIPImageProcessor", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return _saved(model, folder)


def write_siglip_folder(folder: Path) -> Any:
    """A SiglipModel, whose text tower reads its padding."""
    text = {**_TEXT, "hidden_size": 32, "max_position_embeddings": 16, "projection_size": 32, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(2)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_IMAGE)).eval()
    model.logit_bias.data.fill_(-7.0)
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)
    return _saved(model, folder)


def write_clap_folder(folder: Path) -> Any:
    """A ClapModel of 1 s of sound."""
    audio = {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2,
             "num_mel_bins": 64, "spec_size": 128, "window_size": 4, "enable_fusion": True, "projection_dim": 12}  # fmt: skip
    text = {**_TEXT, "max_position_embeddings": 34, "pad_token_id": 0, "projection_dim": 12, "type_vocab_size": 1}
    torch.manual_seed(3)
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=12)
    model = transformers.ClapModel(config).eval()
    transformers.ClapFeatureExtractor(max_length_s=1).save_pretrained(folder)
    return _saved(model, folder)


def _processor(kind: str, **settings: Any) -> Any:
    return getattr(transformers, kind)(resample=3, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], **settings)


def _saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model
