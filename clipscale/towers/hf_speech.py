"""Speech encoders of transformers: Whisper's encoder, wav2vec 2.0, HuBERT, WavLM; the mean over what is not padding.

Batches of unequal recordings give what each recording gives alone: attention, convolutions and norms see no padding. (Whisper
was trained on recordings padded to 30 s with silence and attends to it; there the padding is the same for every batch.)
LayerDrop and transformers' own SpecAugment are switched off: they draw from global random numbers and leave parameters
without gradient.

b samples, T waveform samples, M mel bins, F frames, d hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from clipscale.errors import RequestError
from clipscale.inputs import Modality, SpeechInput
from clipscale.towers import Tower
from clipscale.towers._blocks import standing_after
from clipscale.towers._hugging_face import load_model, normalises_waveform, random_model
from clipscale.towers._module import TowerModule
from clipscale.towers._transformer import masked_mean, valid_positions, widened

WAVEFORM_MODELS = ("wav2vec2", "hubert", "wavlm")
WHISPER_FRAMES_PER_SECOND = 100


class HfSpeech(Tower):
    """A transformers speech encoder, averaged over time."""

    modality: ClassVar[Modality] = "speech"

    model: str | None = None
    """Pretrained weights: a local folder, a hub name, or `package:NAME`, an installed Python package that holds such a folder."""
    config: dict[str, Any] | str | None = None
    """Instead of `model`, random weights: a transformers configuration as a mapping with `model_type`, or a folder or JSON file."""
    max_seconds: float = Field(default=30.0, gt=0)
    """Longer recordings are cut. Whisper pads all to it: with short recordings a smaller value saves most of the work."""
    normalise_waveform: bool | None = None
    """Zero mean and unit variance over each recording, for models of waveforms; default: as the model's files say, else yes."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either `model` (pretrained) or `config` (random weights)")
        return self

    def build(self) -> TowerModule:
        """The encoder, without decoder or heads."""
        model = load_model(self.model) if self.model is not None else random_model(self.config or {})
        if model.config.model_type == "whisper":
            return _Whisper(model.get_encoder(), max_seconds=self.max_seconds)
        if model.config.model_type not in WAVEFORM_MODELS:
            known = ", ".join(("whisper", *WAVEFORM_MODELS))
            raise RequestError(f"hf_speech takes models of type {known}; found '{model.config.model_type}'")
        normalise = self.normalise_waveform
        if normalise is None:
            normalise = normalises_waveform(self.model) if self.model is not None else True
        return _Waveform(model, SpeechInput(self.max_seconds, features="waveform", normalise_waveform=normalise))


class _Whisper(TowerModule):
    def __init__(self, encoder: Any, *, max_seconds: float) -> None:
        super().__init__()
        config = encoder.config
        tokens = int(max_seconds * WHISPER_FRAMES_PER_SECOND) // 2
        if not 0 < tokens <= config.max_source_positions:
            limit = config.max_source_positions * 2 / WHISPER_FRAMES_PER_SECOND
            raise RequestError(f"max_seconds {max_seconds} does not fit this Whisper encoder: it takes 0.02 to {limit} seconds")
        self.encoder = encoder
        self._shorten(tokens)
        encoder.layerdrop = 0.0
        self.embed_dim = config.d_model
        seconds = tokens * 2 / WHISPER_FRAMES_PER_SECOND
        self.input = SpeechInput(seconds, features="whisper_log_mel", num_mels=config.num_mel_bins, pad_to_max=True)

    def _shorten(self, tokens: int) -> None:
        """Keep the first positions only, so that the encoder asks for shorter recordings."""
        whole = self.encoder.embed_positions.weight
        self.encoder.embed_positions = nn.Embedding.from_pretrained(whole[:tokens].detach().clone(), freeze=True)  # type: ignore[no-untyped-call]
        self.encoder.config.max_source_positions = self.encoder.max_source_positions = tokens

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.layers)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        return standing_after(self.encoder, "layers")

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`mel` [b, M, F], F as many as max_seconds has, and `length` [b] in frames to features [b, d]."""
        hidden: Tensor = self.encoder(inputs["mel"]).last_hidden_state
        return masked_mean(hidden, valid_positions((inputs["length"] + 1) // 2, hidden.shape[1]))


class _Waveform(TowerModule):
    def __init__(self, encoder: Any, speech_input: SpeechInput) -> None:
        super().__init__()
        self.encoder = encoder
        self.embed_dim = encoder.config.hidden_size
        self.input = speech_input
        encoder.config.apply_spec_augment, encoder.config.layerdrop = False, 0.0
        encoder.adapter = None
        if hasattr(encoder, "masked_spec_embed"):
            del encoder.masked_spec_embed
        first = encoder.feature_extractor.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = _MaskedChannelNorm(first.layer_norm)

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.encoder.layers)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        after = standing_after(self.encoder, "encoder.layers")
        return [*after, self.encoder.encoder.layer_norm] if self.encoder.config.do_stable_layer_norm else after

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`waveform` [b, T] and `length` [b] in samples to features [b, d]."""
        shortest = _receptive_field(self.encoder.config)
        silenced = inputs["waveform"].masked_fill(~valid_positions(inputs["length"], inputs["waveform"].shape[1]), 0.0)
        waveform = functional.pad(silenced, (0, max(0, shortest - silenced.shape[1])))
        length = inputs["length"].clamp(min=shortest)
        valid = valid_positions(length, waveform.shape[1])
        norm = getattr(self.encoder.feature_extractor.conv_layers[0], "layer_norm", None)
        if isinstance(norm, _MaskedChannelNorm):
            norm.length = (length - self.encoder.config.conv_kernel[0]) // self.encoder.config.conv_stride[0] + 1
        hidden: Tensor = self.encoder(waveform, attention_mask=valid.long()).last_hidden_state
        frames = self.encoder._get_feat_extract_output_lengths(length)
        return masked_mean(hidden, valid_positions(frames, hidden.shape[1]))


class _MaskedChannelNorm(nn.Module):
    """The group norm of wav2vec2's first convolution (each channel over time), over a recording's own frames only."""

    length: Tensor
    """[b]: frames of each recording; set before each call."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        assert norm.num_groups == norm.num_channels
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels, frames] -> the same."""
        valid = valid_positions(self.length, x.shape[2]).unsqueeze(1)
        count = valid.sum(dim=2, keepdim=True)
        wide = widened(x)
        mean = wide.masked_fill(~valid, 0.0).sum(dim=2, keepdim=True) / count
        variance = (wide - mean).masked_fill(~valid, 0.0).square().sum(dim=2, keepdim=True) / count
        normal = (wide - mean) * (variance + self.eps).rsqrt()
        return (normal * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)).to(x.dtype)


def _receptive_field(config: Any) -> int:
    """Samples that make one frame."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
