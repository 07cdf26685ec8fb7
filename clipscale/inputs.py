"""What a tower wants to be fed: the contract between data (which makes it) and towers (which declare it).

Every tower module carries one of these as `module.input`. Legend: b samples, L tokens, T waveform samples, F frames,
M mel bins, H = W = size pixels.

| modality | in a batch, on the CPU | prepared, on the device |
|---|---|---|
| image | pixels uint8 [b, 3, H, W] | pixels float [b, 3, H, W], normalised |
| speech | waveform float32 [b, T], length int64 [b] | mel float [b, M, F] or waveform float [b, T]; length int64 [b] in frames or samples |
| text | tokens int64 [b, L], mask int64 [b, L] | the same |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "speech", "text"]


@dataclass(frozen=True)
class ImageInput:
    """Square images, normalised per channel."""

    size: int
    """Height and width, pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted, per channel, for pixels in [0, 1]; the default is OpenAI CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divided by, per channel; the default is OpenAI CLIP's."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["crop", "squash", "pad"] = "crop"
    """How a picture of another shape becomes square: centre crop, aspect ignored, or padded with black."""


@dataclass(frozen=True)
class SpeechInput:
    """Mono speech, as a waveform or as log-mel frames."""

    max_seconds: float
    """Longer recordings are cut to their first `max_seconds`."""
    sample_rate: int = 16_000
    """Hertz; recordings at another rate are resampled."""
    features: Literal["waveform", "log_mel", "whisper_log_mel"] = "log_mel"
    """`log_mel`: natural logarithm, each utterance zero mean and unit variance; `whisper_log_mel`: Whisper's log10 with its clamp."""
    num_mels: int = 80
    n_fft: int = 400
    """Window and FFT length, samples."""
    hop: int = 160
    """Samples from one frame to the next."""
    pad_to_max: bool = False
    """Pad every batch to `max_seconds` (Whisper) rather than to its longest recording."""
    normalise_waveform: bool = False
    """Zero mean, unit variance over each utterance (wav2vec2 and kin)."""


@dataclass(frozen=True)
class TextInput:
    """Tokenised captions."""

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    """b captions to `tokens` and `mask`, both int64 [b, L]; too long ones are cut."""
    context_length: int
    """The largest L."""


Input = ImageInput | SpeechInput | TextInput
