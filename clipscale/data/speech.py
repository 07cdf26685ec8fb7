"""Recordings: decoded on the CPU, at most as long as wanted; augmented and turned into log-mel frames on the device.

b recordings, T samples of the longest, F = T / hop frames, M mel bins.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from clipscale.data.media import speech_suffix
from clipscale.data.random_numbers import between, uniform, white_noise
from clipscale.errors import ConfigError, ShardError
from clipscale.settings import Settings

if TYPE_CHECKING:
    from clipscale.inputs import SpeechInput

MAX_CHANNELS = 8
"""Recordings with more channels are refused."""
_SAMPLES_AT_ONCE = 160_000  # on the CPU: spectra of more than some 10 s leave the cache, and take 1.4 times as long
_VARIANCE_FLOOR = 1e-7  # as transformers' feature extractors


class SpeechAugment(Settings):
    """Random changes of training recordings, drawn anew for every sample and epoch."""

    gain_db: float = Field(default=0.0, ge=0)
    """Louder or softer by up to this, decibels."""
    shift_seconds: float = Field(default=0.0, ge=0)
    """Begin later (silence first) or earlier (the beginning is lost) by up to this."""
    noise: float = Field(default=0.0, ge=0)
    """Add uniform white noise of up to this share of the recording's root mean square."""
    time_masks: int = Field(default=0, ge=0)
    """Stretches of time to blank (SpecAugment, Park et al. 2019, arXiv:1904.08779)."""
    time_mask_seconds: float = Field(default=0.1, gt=0)
    """Longest of these stretches."""
    frequency_masks: int = Field(default=0, ge=0)
    """Bands of mel bins to blank; only for towers that are fed log-mel frames."""
    frequency_mask_bins: int = Field(default=8, ge=1)
    """Widest of these bands."""


def decode_speech(data: bytes, spec: SpeechInput) -> np.ndarray:
    """A stored recording, mono, at the tower's sample rate: int16 as stored where possible, else float32, [samples].

    At most the first `max_seconds` are decoded, whatever the header promises.

    Raises:
        ShardError: it is no recording, is damaged, empty, or holds values that are not finite.
    """
    suffix = speech_suffix(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if file.channels > MAX_CHANNELS or rate < 1:
                raise ShardError(
                    f"the {suffix} recording has {file.channels} channels at {rate} Hz; at most {MAX_CHANNELS} channels are read"
                )
            kind = "int16" if file.subtype == "PCM_16" else "float32"
            wave: np.ndarray = file.read(math.ceil(spec.max_seconds * rate), dtype=kind)
    except soundfile.SoundFileError as error:
        raise ShardError(f"the {suffix} recording is damaged: {error}") from error
    if not len(wave):
        raise ShardError(f"the {suffix} recording has no samples")
    if wave.ndim == 2 or rate != spec.sample_rate:
        wave = _resampled(_mono(as_float(wave)), rate, spec.sample_rate)
    if wave.dtype != np.int16 and not np.isfinite(wave).all():
        raise ShardError(f"the {suffix} recording holds values that are not finite")
    return wave[: round(spec.max_seconds * spec.sample_rate)]


def as_float(wave: np.ndarray) -> np.ndarray:
    """Samples from -1 to 1, float32."""
    return wave.astype(np.float32) / 32768 if wave.dtype == np.int16 else wave


def _mono(wave: np.ndarray) -> np.ndarray:
    return wave.mean(axis=1) if wave.ndim == 2 else wave


def _resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return wave
    resampled: np.ndarray = soxr.resample(wave, rate, wanted)
    if not len(resampled):
        raise ShardError(f"the recording is too short: {len(wave)} samples at {rate} Hz")
    return resampled


def collate_speech(waves: Sequence[np.ndarray], spec: SpeechInput) -> dict[str, Tensor]:
    """Recordings padded with silence: `waveform` float32 [b, T] and `length` int64 [b], in samples; T is a multiple of hop."""
    longest = round(spec.max_seconds * spec.sample_rate) if spec.pad_to_max else max((len(wave) for wave in waves), default=1)
    padded = np.zeros((len(waves), -(-max(longest, spec.n_fft) // spec.hop) * spec.hop), dtype=np.float32)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = as_float(wave)
    return {"waveform": torch.from_numpy(padded), "length": torch.tensor([len(wave) for wave in waves], dtype=torch.int64)}


def prepare_speech(
    batch: dict[str, Tensor],
    spec: SpeechInput,
    augment: SpeechAugment | None = None,
    seeds: Tensor | None = None,
) -> dict[str, Tensor]:
    """Recordings as the tower is fed, on the device they are on: `waveform` [b, T] or `mel` [b, M, F], and `length` int64 [b].

    `augment` needs `seeds`, int64 [b]. A recording's result depends on its own samples and seed, not on its neighbours.
    Whatever stands behind a recording's length is zero, except in Whisper's frames, which hold its value for silence.

    Raises:
        ConfigError: frequency masks for a tower that is fed waveforms.
    """
    if augment is not None and augment.frequency_masks and spec.features == "waveform":
        raise ConfigError("frequency_masks blank mel bins, but this speech tower is fed waveforms; set frequency_masks to 0")
    assert augment is None or seeds is not None, "augmentation is keyed by the batch's seeds"
    wave, length = batch["waveform"], batch["length"]
    at_once = len(wave) if wave.is_cuda else max(1, _SAMPLES_AT_ONCE // wave.shape[1])
    parts = [
        _prepared(wave[rows], length[rows], spec, augment, None if seeds is None else seeds[rows])
        for rows in (slice(begin, begin + at_once) for begin in range(0, max(1, len(wave)), max(1, at_once)))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _prepared(wave: Tensor, length: Tensor, spec: SpeechInput, augment: SpeechAugment | None, seeds: Tensor | None) -> dict[str, Tensor]:
    if augment is not None and seeds is not None:
        wave, length = _changed(wave, length, spec, augment, seeds)
    if spec.features == "waveform":
        return {"waveform": _normalised_wave(wave, length) if spec.normalise_waveform else wave, "length": length}
    mel, frames = log_mel(wave, length, spec)
    if augment is not None and seeds is not None:
        mel = _blanked(mel, frames, spec, augment, seeds)
    return {"mel": mel, "length": frames}


def _valid(size: int, length: Tensor) -> Tensor:
    """Which of `size` places a row fills: bool [b, size]."""
    return torch.arange(size, device=length.device) < length[:, None]


def _mean_and_deviation(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Over the valid entries of each row, [b, n] -> [b, 1] twice."""
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = (values * valid).sum(1, keepdim=True) / count
    variance = ((values - mean).square() * valid).sum(1, keepdim=True) / count
    return mean, (variance + _VARIANCE_FLOOR).sqrt()


def _normalised_wave(wave: Tensor, length: Tensor) -> Tensor:
    valid = _valid(wave.shape[1], length)
    mean, deviation = _mean_and_deviation(wave, valid)
    return (wave - mean) / deviation * valid


def log_mel(wave: Tensor, length: Tensor, spec: SpeechInput) -> tuple[Tensor, Tensor]:
    """Log-mel frames [b, M, F] and how many of them each recording fills, int64 [b].

    `whisper_log_mel` is Radford et al. 2022 (arXiv:2212.04356) as transformers computes it. `log_mel` takes the natural
    logarithm and gives each recording zero mean and unit variance over its frames; the frames behind are zero.
    """
    frames = (length + spec.hop - 1) // spec.hop
    mel = _mel_power(wave, spec)
    valid = _valid(mel.shape[2], frames)[:, None]
    if spec.features == "whisper_log_mel":
        power = mel.clamp(min=1e-10).log10()
        loudest = (power if spec.pad_to_max else power.masked_fill(~valid, -10.0)).amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(power, loudest - 8) + 4) / 4, frames
    logarithm = mel.clamp(min=1e-10).log()
    everywhere = valid.expand_as(mel).flatten(1)
    mean, deviation = _mean_and_deviation(logarithm.flatten(1), everywhere)
    return (logarithm - mean[:, :, None]) / deviation[:, :, None] * valid, frames


def _mel_power(wave: Tensor, spec: SpeechInput) -> Tensor:
    """Mel power of frames centred on multiples of hop: [b, T] -> [b, M, T / hop].

    Left of the recording stands its mirror image, as in Whisper; right of it silence, so that padding changes nothing,
    except where Whisper's own padding to a fixed length does the same for every recording.
    """
    half = spec.n_fft // 2
    padded = (
        functional.pad(wave, (half, half), mode="reflect")
        if spec.pad_to_max
        else functional.pad(functional.pad(wave, (half, 0), mode="reflect"), (0, half))
    )
    window = torch.hann_window(spec.n_fft, device=wave.device)
    spectrum = torch.stft(padded, spec.n_fft, spec.hop, window=window, center=False, return_complex=True)[..., : wave.shape[1] // spec.hop]
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    halves = _filter_halves(spec.n_fft, spec.sample_rate, spec.num_mels)
    return torch.cat([filters.to(wave.device) @ power[:, frequencies] for frequencies, filters in halves], dim=1)


@functools.cache
def _filter_halves(n_fft: int, sample_rate: int, num_mels: int) -> list[tuple[slice, Tensor]]:
    """The lower and the upper half of the filters, each with the frequencies it hears: the other products are with zeros."""
    halves = []
    for filters in mel_filters(n_fft, sample_rate, num_mels).tensor_split(2):
        heard = filters.any(0).nonzero().flatten().tolist() or [0]  # filters narrower than the spectrum's steps hear nothing
        frequencies = slice(heard[0], heard[-1] + 1)
        halves.append((frequencies, filters[:, frequencies].contiguous()))
    return halves


@functools.cache
def mel_filters(n_fft: int, sample_rate: int, num_mels: int) -> Tensor:
    """Slaney's triangular filters of equal area, as librosa's and Whisper's: [M, n_fft / 2 + 1]."""
    corners = _mel_to_hertz(np.linspace(0, _hertz_to_mel(sample_rate / 2), num_mels + 2))
    frequencies = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)) * (2 / (corners[2:] - corners[:-2]))[:, None]
    return torch.from_numpy(triangles).float()


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz (15 mel), logarithmic above (27 mel for a factor of 6.4)."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def _changed(wave: Tensor, length: Tensor, spec: SpeechInput, augment: SpeechAugment, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Gain, noise, shift, and for towers fed waveforms the time masks."""
    if augment.gain_db:
        gain = between(seeds, -augment.gain_db, augment.gain_db, purpose="speech/gain")
        wave = wave * (10 ** (gain / 20))[:, None]
    if augment.noise:
        wave = _noisy(wave, length, augment, seeds)
    if augment.shift_seconds:
        wave, length = _shifted(wave, length, spec, augment, seeds)
    if spec.features == "waveform" and augment.time_masks:
        longest = round(augment.time_mask_seconds * spec.sample_rate)
        wave = wave.masked_fill(_stretches(seeds, wave.shape[1], length, augment.time_masks, longest, "time"), 0.0)
    return wave, length


def _noisy(wave: Tensor, length: Tensor, augment: SpeechAugment, seeds: Tensor) -> Tensor:
    valid = _valid(wave.shape[1], length)
    loudness = (wave.square().sum(1) / length).sqrt()
    share = between(seeds, 0, augment.noise, purpose="speech/noise share")
    noise = white_noise(seeds, wave.shape[1], purpose="speech/noise")
    return wave + noise * (math.sqrt(3) * loudness * share)[:, None] * valid  # the root mean square of uniform noise is 1 / √3


def _shifted(wave: Tensor, length: Tensor, spec: SpeechInput, augment: SpeechAugment, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Later or earlier by a random number of samples; never longer than `max_seconds`, never empty."""
    reach, most = round(augment.shift_seconds * spec.sample_rate), round(spec.max_seconds * spec.sample_rate)
    delay = (between(seeds, -1, 1, purpose="speech/shift") * reach).round().long()
    delay = torch.maximum(delay, 1 - length)
    size = min(-(-(wave.shape[1] + reach) // spec.hop) * spec.hop, max(-(-most // spec.hop) * spec.hop, wave.shape[1]))
    views = functional.pad(wave, (reach, reach + size - wave.shape[1])).unfold(1, size, 1)  # [b, start, size], nothing copied yet
    moved = views[torch.arange(len(wave), device=wave.device), reach - delay]
    length = (length + delay).clamp(max=most)
    return moved * _valid(size, length), length


def _blanked(mel: Tensor, frames: Tensor, spec: SpeechInput, augment: SpeechAugment, seeds: Tensor) -> Tensor:
    """Time and frequency masks: blanked entries get the recording's mean."""
    if not augment.time_masks and not augment.frequency_masks:
        return mel
    longest = max(1, round(augment.time_mask_seconds * spec.sample_rate / spec.hop))
    times = _stretches(seeds, mel.shape[2], frames, augment.time_masks, longest, "time")
    bins = torch.full_like(frames, mel.shape[1])
    bands = _stretches(seeds, mel.shape[1], bins, augment.frequency_masks, augment.frequency_mask_bins, "frequency")
    valid = _valid(mel.shape[2], frames)[:, None]
    mean, _ = _mean_and_deviation(mel.flatten(1), valid.expand_as(mel).flatten(1))
    return torch.where((times[:, None] | bands[:, :, None]) & valid, mean[:, :, None], mel)


def _stretches(seeds: Tensor, size: int, length: Tensor, count: int, longest: int, purpose: str) -> Tensor:
    """`count` random stretches inside each row's length, of 0 to `longest` places: bool [b, size]."""
    places = torch.arange(size, device=seeds.device)
    covered = torch.zeros(len(seeds), size, dtype=torch.bool, device=seeds.device)
    for number in range(count):
        draws = uniform(seeds, 2, purpose=f"speech/{purpose} mask {number}")
        width = torch.minimum((draws[:, 0] * (longest + 1)).long(), length)
        begin = (draws[:, 1] * (length - width + 1)).long()
        covered |= (places >= begin[:, None]) & (places < (begin + width)[:, None])
    return covered
