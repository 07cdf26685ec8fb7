"""Whole models in transformers' folders: CLIP, SigLIP and CLAP, fed as their own processors feed them.

b samples, L tokens, T waveform samples, D width of the shared space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, Input, SpeechInput, TextInput
from clipscale.towers._both_towers import BothTowers
from clipscale.towers._hugging_face import load_model, load_tokenizer, quiet
from clipscale.towers._module import TowerModule

KNOWN = ("clip", "siglip", "clap")
_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers, as preprocessor_config.json holds them


def hugging_face_towers(folder: Path) -> BothTowers:
    """The towers of a folder that holds a CLIP, SigLIP or CLAP model with its tokenizer and preprocessor.

    Raises:
        RequestError: it is of another kind, lacks files or weights, or asks for preparation that cannot be given.
    """
    kind = _model_type(folder)
    model = load_model(str(folder))
    text = _Text(model, _text_input(model.config.text_config, str(folder), kind), masked=kind != "siglip")
    if kind == "clap":
        speech = _Speech(model, _feature_extractor(folder))
        return BothTowers({"speech": speech, "text": text}, speech.embed_dim, math.exp(model.logit_scale_a.item()))
    image = _Image(model, _image_input(folder))
    bias = model.logit_bias.item() if kind == "siglip" else None
    return BothTowers({"image": image, "text": text}, image.embed_dim, math.exp(model.logit_scale.item()), bias)


def _model_type(folder: Path) -> str:
    try:
        with quiet():
            kind = str(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: its config.json cannot be read: {' '.join(str(error).split())[:300]}") from error
    if kind not in KNOWN:
        raise RequestError(f"{folder} holds a model of type '{kind}'; models of type {', '.join(KNOWN)} can be evaluated")
    return kind


class _Tower(TowerModule):
    """One half of a model; the library's own function makes its features."""

    def __init__(self, model: Any, tower_input: Input) -> None:
        super().__init__()
        self.model = model
        self.input = tower_input
        self.embed_dim = _width(model.config)

    def blocks(self) -> list[nn.Module]:
        return []

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return []


class _Image(_Tower):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`pixels` [b, 3, H, W] to [b, D]."""
        return _features(self.model.get_image_features(pixel_values=inputs["pixels"]))


class _Text(_Tower):
    def __init__(self, model: Any, tower_input: TextInput, *, masked: bool) -> None:
        """
        Args:
            masked: Whether the model is told what is padding; SigLIP was trained to read its padding.
        """
        super().__init__(model, tower_input)
        self.masked = masked

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`tokens` and `mask` [b, L] to [b, D]."""
        mask = {"attention_mask": inputs["mask"]} if self.masked else {}
        return _features(self.model.get_text_features(input_ids=inputs["tokens"], **mask))


class _Speech(_Tower):
    """CLAP's audio tower. Its extractor repeats short recordings up to the length it was trained on; longer ones are cut to it."""

    def __init__(self, model: Any, extractor: Any) -> None:
        seconds, rate = float(extractor.max_length_s), int(extractor.sampling_rate)
        super().__init__(model, SpeechInput(seconds, sample_rate=rate, features="waveform"))
        self.extractor = extractor

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`waveform` [b, T] and `length` [b] to [b, D]."""
        waves = [wave[:length].cpu().numpy() for wave, length in zip(inputs["waveform"], inputs["length"].tolist(), strict=True)]
        extracted = self.extractor(waves, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        mel = extracted["input_features"].to(inputs["waveform"])
        # The extractor calls one recording of a batch, drawn at random, longer than the others when none is.
        longer = torch.zeros(len(waves), 1, dtype=torch.bool, device=mel.device)
        return _features(self.model.get_audio_features(input_features=mel, is_longer=longer))


def _features(output: Any) -> Tensor:
    """transformers 5 gives an output object whose pooled part is the projected features; earlier versions gave these alone."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _width(config: Any) -> int:
    """SigLIP has no projection of its own; its towers are as wide as each other."""
    return int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size)


@dataclass(frozen=True)
class Tokenize:
    """Captions to `tokens` and `mask` [b, L], as the model's own tokenizer makes them."""

    tokenizer: Any
    context_length: int
    padding: Literal["longest", "max_length"]

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        limits = {"padding": self.padding, "truncation": True, "max_length": self.context_length}
        encoded = self.tokenizer(captions, return_tensors="pt", return_attention_mask=True, **limits)
        return {"tokens": encoded["input_ids"], "mask": encoded["attention_mask"]}


def _text_input(config: Any, folder: str, kind: str) -> TextInput:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise RequestError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}")
    taken = 2 if config.model_type == "clap_text_model" else 0  # positions that RoBERTa never uses
    length = min(config.max_position_embeddings - taken, tokenizer.model_max_length)
    return TextInput(Tokenize(tokenizer, length, "max_length" if kind == "siglip" else "longest"), length)


def _feature_extractor(folder: Path) -> Any:
    try:
        with quiet():
            return transformers.ClapFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: its preprocessor_config.json cannot be read: {' '.join(str(error).split())[:300]}") from error


def _image_input(folder: Path) -> ImageInput:
    """How the folder's processor prepares pictures.

    Raises:
        RequestError: it does something that is not done here, so that the figures would be another model's.
    """
    try:
        with quiet():
            asked = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: its preprocessor_config.json cannot be read: {' '.join(str(error).split())[:300]}") from error
    resized, cropped = _sides(asked, "do_resize", "size"), _sides(asked, "do_center_crop", "crop_size")
    square = cropped or resized
    squash = resized is not None and resized[0] > 0 and cropped in (None, resized)
    crop = resized is not None and cropped is not None and resized == (0, cropped[0])
    if not (squash or crop) or square is None or square[0] != square[1] or asked.get("resample") not in (_BILINEAR, _BICUBIC):
        raise RequestError(f"{folder} asks for pictures of size {asked.get('size')} cropped to {asked.get('crop_size')} with Pillow's "
                           f"filter {asked.get('resample')}; only bilinear or bicubic and square is done")  # fmt: skip
    if not asked.get("do_normalize", True) or abs(asked.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise RequestError(f"{folder} asks for pictures that are not scaled to [0, 1] and normalised; that is not done here")
    mean, std = tuple(asked["image_mean"]), tuple(asked["image_std"])
    return ImageInput(square[0], mean, std, "bilinear" if asked["resample"] == _BILINEAR else "bicubic", "crop" if crop else "squash")


def _sides(asked: dict[str, Any], switch: str, name: str) -> tuple[int, int] | None:
    """Height and width of a step of the processor; (0, side) for the shortest side; None: the step is left out."""
    size = asked.get(name)
    if not asked.get(switch) or size is None:
        return None
    if isinstance(size, int):
        return size, size
    shortest = size.get("shortest_edge")
    return (0, int(shortest)) if shortest else (int(size.get("height") or 0), int(size.get("width") or 0))
