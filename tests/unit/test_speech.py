"""Recordings of every kind decode to the sound they hold; log-mel frames equal Whisper's; neighbours change nothing."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from making_data import recording, tone

from clipscale.data.speech import SpeechAugment, as_float, collate_speech, decode_speech, prepare_speech
from clipscale.errors import ConfigError, ShardError
from clipscale.inputs import SpeechInput

WAVEFORM = SpeechInput(max_seconds=3.0, features="waveform")
LOG_MEL = SpeechInput(max_seconds=3.0)
WHISPER = SpeechInput(max_seconds=3.0, features="whisper_log_mel")


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    """A voice's shape: a gliding tone with overtones that comes and goes, and some noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    glide = 2 * np.pi * np.cumsum(120 + 60 * np.sin(3 * time_s + seed)) / 16_000
    voice = sum(np.sin(n * glide) / n for n in range(1, 20))
    return (0.1 * voice * (1 + np.sin(9 * time_s)) + 0.005 * rng.standard_normal(len(time_s))).astype(np.float32)


def collated(*waves: np.ndarray, spec: SpeechInput = LOG_MEL) -> dict[str, torch.Tensor]:
    return collate_speech(waves, spec)


@pytest.mark.parametrize(
    ("kind", "subtype", "step"), [("FLAC", "PCM_16", 2**-15), ("WAV", "PCM_16", 2**-15), ("FLAC", "PCM_24", 2**-23), ("WAV", "FLOAT", 0)]
)
def test_mono_recordings_decode_to_their_samples(kind: str, subtype: str, step: float) -> None:
    wave = speechlike(1.0)
    found = as_float(decode_speech(recording(wave, kind=kind, subtype=subtype), WAVEFORM))
    np.testing.assert_allclose(found, wave, atol=step)


def test_16_bit_recordings_stay_16_bit_until_the_batch() -> None:
    assert decode_speech(recording(speechlike(0.5)), WAVEFORM).dtype == np.int16


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_sample_rates_keep_pitch_length_and_loudness(rate: int) -> None:
    wave = as_float(decode_speech(recording(tone(1.0, hertz=1000, rate=rate), rate), WAVEFORM))
    assert abs(len(wave) - 16_000) <= 1
    middle = wave[4000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * 16_000 / len(middle) == pytest.approx(1000, abs=2)
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)


def test_resampling_lets_nothing_fold_down() -> None:
    """14 kHz cannot be told at 16 kHz samples a second; it must vanish, not come back as 2 kHz."""
    wave = as_float(decode_speech(recording(tone(1.0, hertz=14_000, rate=44_100), 44_100), WAVEFORM))
    assert np.abs(wave[2000:14_000]).max() < 0.001


def test_stereo_is_averaged() -> None:
    left, right = speechlike(0.5), speechlike(0.5, seed=1)
    found = as_float(decode_speech(recording(np.stack([left, right], axis=1)), WAVEFORM))
    np.testing.assert_allclose(found, (left + right) / 2, atol=2**-15)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_only_the_first_max_seconds_are_kept(rate: int) -> None:
    wave = decode_speech(recording(tone(5.0, rate=rate), rate), WAVEFORM)
    assert len(wave) == 48_000


def test_an_hour_of_silence_takes_neither_time_nor_memory() -> None:
    hour = recording(np.zeros(16_000 * 3600, dtype=np.int16))
    tracemalloc.start()
    begin = time.process_time()
    assert len(decode_speech(hour, WAVEFORM)) == 48_000
    seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5  # 3 ms measured; decoding the hour takes 1 s
    assert peak < 5e6  # all of it would be 115 MB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"OggS....", "not a flac or wav recording"),
        (recording(tone(0.5))[:30], "the flac recording is damaged"),
        (recording(np.zeros(0), kind="WAV"), "has no samples"),
        (recording(np.array([0.0, np.nan, 0.1]), kind="WAV", subtype="FLOAT"), "not finite"),
        (recording(np.zeros((100, 9)), kind="WAV"), "has 9 channels"),
        (recording(tone(1.0))[:4000], "the flac recording is damaged"),
    ],
    ids=["empty", "of another kind", "cut in its header", "without samples", "no numbers", "nine channels", "cut in its samples"],
)  # names of their own: a WAV's bytes hold the time it was written, and parallel processes must collect the same tests
def test_damaged_recordings_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        decode_speech(data, WAVEFORM)


def test_collating_pads_with_silence_to_whole_frames() -> None:
    batch = collated(np.full(1000, 16_384, dtype=np.int16), np.full(500, 0.25, dtype=np.float32))
    assert batch["waveform"].shape == (2, 1120)  # 7 frames of 160
    assert batch["length"].tolist() == [1000, 500]
    assert batch["waveform"][0, :1000].unique().tolist() == [0.5]
    assert batch["waveform"][1, :500].unique().tolist() == [0.25]
    assert not batch["waveform"][0, 1000:].any()
    assert not batch["waveform"][1, 500:].any()


def test_pad_to_max_pads_to_max() -> None:
    assert collated(np.zeros(1000, np.float32), spec=SpeechInput(max_seconds=2.0, pad_to_max=True))["waveform"].shape == (1, 32_000)


def whisper_frames(waves: list[np.ndarray], seconds: int | None, num_mels: int = 80) -> Any:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=num_mels, chunk_length=seconds or 30)
    padding = "max_length" if seconds else "longest"
    return extractor(waves, sampling_rate=16_000, padding=padding, return_attention_mask=True, return_tensors="np")


@pytest.mark.parametrize("num_mels", [80, 128])
def test_whisper_frames_equal_transformers(num_mels: int) -> None:
    """Recordings shorter than, and exactly as long as, the window that Whisper pads to."""
    waves = [speechlike(1.7), speechlike(3.0, seed=1), speechlike(0.33, seed=2)]
    spec = SpeechInput(max_seconds=3.0, features="whisper_log_mel", pad_to_max=True, num_mels=num_mels)
    ours, wanted = prepare_speech(collate_speech(waves, spec), spec), whisper_frames(waves, 3, num_mels)
    assert ours["mel"].shape == (3, num_mels, 300)
    np.testing.assert_allclose(ours["mel"], wanted["input_features"], atol=1e-5)  # transformers' own torch and numpy differ by 6e-6
    assert ours["length"].tolist() == wanted["attention_mask"].sum(1).tolist()


def test_unpadded_whisper_frames_equal_transformers_except_at_the_end() -> None:
    """Right of a recording we see silence, transformers its mirror image: the last frame differs by that, and no other."""
    wave = speechlike(1.6)
    ours = prepare_speech(collated(wave, spec=WHISPER), WHISPER)["mel"][0]
    wanted = whisper_frames([wave], None)["input_features"][0]
    assert ours.shape == wanted.shape == (80, 160)
    np.testing.assert_allclose(ours[:, :-1], wanted[:, :-1], atol=1e-5)


def test_mel_filters_equal_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank

    from clipscale.data.speech import mel_filters

    wanted = mel_filter_bank(257, 64, 0.0, 11_025.0, 22_050, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(512, 22_050, 64), wanted.T, atol=1e-7)


def test_log_mel_has_zero_mean_and_unit_variance_over_each_recording() -> None:
    prepared = prepare_speech(collated(speechlike(1.0), 0.01 * speechlike(2.0, seed=1)), LOG_MEL)
    assert prepared["length"].tolist() == [100, 200]
    for mel, frames in zip(prepared["mel"], (100, 200), strict=True):
        assert mel[:, :frames].mean().item() == pytest.approx(0, abs=1e-4)
        assert mel[:, :frames].std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert not prepared["mel"][0, :, 100:].any()


def test_log_mel_does_not_hear_how_loud_a_recording_is() -> None:
    wave = speechlike(1.0)
    mels = prepare_speech(collated(wave, wave / 8), LOG_MEL)["mel"]
    torch.testing.assert_close(mels[0], mels[1], atol=1e-3, rtol=0)  # floor of 1e-10 under the logarithm


def test_log_mel_is_the_logarithm_of_power_in_mel_bands() -> None:
    """One frame in the middle of a recording, from numpy's FFT and transformers' filters."""
    from transformers.audio_utils import mel_filter_bank

    wave = speechlike(1.0)
    frames = np.stack([wave[160 * n - 200 : 160 * n + 200] for n in range(2, 98)])
    power = np.abs(np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)))) ** 2
    wanted = np.log(power @ mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")).T
    ours = prepare_speech(collated(wave), LOG_MEL)["mel"][0, :, 2:98].numpy()
    slope, offset = np.polyfit(wanted.ravel(), ours.ravel(), 1)  # ours is standardised
    np.testing.assert_allclose(ours, slope * wanted + offset, atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [WAVEFORM, LOG_MEL, WHISPER, SpeechInput(max_seconds=3.0, features="waveform", normalise_waveform=True)],
    ids=["waveform", "log_mel", "whisper", "normalised"],
)
@pytest.mark.parametrize("augment", [None, "all"])
def test_a_recordings_result_does_not_depend_on_its_neighbours(spec: SpeechInput, augment: str | None) -> None:
    waves = [speechlike(length, seed) for seed, length in enumerate((0.9, 2.4, 0.01, 1.7) * 3)]
    masks = {} if spec.features == "waveform" else {"frequency_masks": 2}
    change = SpeechAugment(gain_db=6, shift_seconds=0.1, noise=0.1, time_masks=2, **masks) if augment else None
    seeds = torch.arange(12) * 77 if augment else None
    together = prepare_speech(collate_speech(waves, spec), spec, change, seeds)
    name = "waveform" if spec.features == "waveform" else "mel"
    for row, wave in enumerate(waves):
        alone = prepare_speech(collate_speech([wave], spec), spec, change, None if seeds is None else seeds[row : row + 1])
        length = int(alone["length"][0])
        assert length == together["length"][row]
        torch.testing.assert_close(alone[name][0, ..., :length], together[name][row, ..., :length], atol=2e-4, rtol=0)  # other sums' order


def test_a_click_at_the_very_end_is_heard_the_same_beside_a_longer_recording() -> None:
    """Whisper's frames are measured against the loudest; the one behind the end, that only padding makes, must not be it."""
    click = 0.001 * speechlike(1.0)
    click[-1] = 1.0
    alone = prepare_speech(collated(click, spec=WHISPER), WHISPER)["mel"][0]
    beside = prepare_speech(collated(click, speechlike(2.0), spec=WHISPER), WHISPER)["mel"][0]
    torch.testing.assert_close(alone, beside[:, :100], atol=1e-5, rtol=0)


def test_normalised_waveforms_equal_wav2vec2s() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    spec = SpeechInput(max_seconds=3.0, features="waveform", normalise_waveform=True)
    waves = [speechlike(1.0), speechlike(0.6, seed=1)]
    wanted = Wav2Vec2FeatureExtractor(return_attention_mask=True)(waves, sampling_rate=16_000, padding=True, return_tensors="np")
    ours = prepare_speech(collate_speech(waves, spec), spec)
    np.testing.assert_allclose(ours["waveform"], wanted["input_values"], atol=1e-4)
    assert ours["length"].tolist() == wanted["attention_mask"].sum(1).tolist()


def changed(
    augment: SpeechAugment, spec: SpeechInput = WAVEFORM, *, seconds: float = 1.0, count: int = 200
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A recording, what augmentation makes of it with `count` seeds, and the lengths."""
    wave = speechlike(seconds)
    prepared = prepare_speech(collate_speech([wave] * count, spec), spec, augment, torch.arange(count))
    return torch.from_numpy(wave), prepared["waveform" if spec.features == "waveform" else "mel"], prepared["length"]


def test_augmentation_without_settings_changes_nothing() -> None:
    wave, waves, length = changed(SpeechAugment(), count=2)
    assert torch.equal(waves, wave.expand(2, -1))
    assert length.tolist() == [16_000, 16_000]


def test_gain_is_within_its_decibels() -> None:
    wave, waves, _ = changed(SpeechAugment(gain_db=6))
    decibels = 20 * torch.log10(waves[:, 5000] / wave[5000])
    assert -6 <= decibels.min() < -5.5
    assert 5.5 < decibels.max() <= 6
    torch.testing.assert_close(waves / waves[:, 5000:5001], (wave / wave[5000]).expand(200, -1), rtol=1e-4, atol=1e-5)


def test_shifts_move_the_recording_and_lose_only_its_beginning() -> None:
    wave, waves, length = changed(SpeechAugment(shift_seconds=0.1))
    delays = (length - 16_000).tolist()
    assert -1600 <= min(delays) < -1400
    assert 1400 < max(delays) <= 1600
    for moved, delay in zip(waves, delays, strict=True):
        assert torch.equal(moved[max(delay, 0) : 16_000 + delay], wave[max(-delay, 0) :])
        assert not moved[: max(delay, 0)].any()
        assert not moved[16_000 + delay :].any()


def test_shifts_stay_within_max_seconds() -> None:
    spec = SpeechInput(max_seconds=1.0, features="waveform")
    _, waves, length = changed(SpeechAugment(shift_seconds=0.1), spec)
    assert length.max() == 16_000
    assert waves.shape[1] == 16_000


def test_noise_is_a_share_of_the_recordings_loudness_and_keeps_off_the_padding() -> None:
    spec = WAVEFORM
    quiet, loud = 0.1 * speechlike(1.0), speechlike(2.0, seed=1)
    seeds = torch.arange(100)
    for wave in (quiet, loud):
        batch = collate_speech([wave, np.zeros(48_000, np.float32)] * 50, spec)
        noisy = prepare_speech(batch, spec, SpeechAugment(noise=0.2), seeds)["waveform"][::2]
        share = (noisy - batch["waveform"][::2])[:, : len(wave)].square().mean(1).sqrt() / np.sqrt((wave**2).mean())
        assert share.max() <= 0.2 * 1.02
        assert share.mean().item() == pytest.approx(0.1, abs=0.03)  # four standard deviations of 50 uniform shares
        assert not noisy[:, len(wave) :].any()


def test_masks_blank_what_they_say_and_no_more() -> None:
    """Blanked mel bins hold the recording's mean, which is zero."""
    spec = SpeechInput(max_seconds=3.0)
    augment = SpeechAugment(time_masks=1, time_mask_seconds=0.2, frequency_masks=1, frequency_mask_bins=10)
    _, mels, _ = changed(augment, spec)
    plain = prepare_speech(collate_speech([speechlike(1.0)], spec), spec)["mel"][0]
    blank = mels.abs() < 1e-5
    times, bands = blank.all(1).sum(1), blank.all(2).sum(1)
    assert times.max() == 20
    assert bands.max() == 10
    assert times.min() == bands.min() == 0
    kept = ~(blank.all(1)[:, None] | blank.all(2)[:, :, None])
    torch.testing.assert_close(mels[kept], plain.expand_as(mels)[kept], atol=1e-4, rtol=0)


def test_time_masks_silence_waveforms() -> None:
    _, waves, _ = changed(SpeechAugment(time_masks=1, time_mask_seconds=0.05))
    silent = (waves == 0).sum(1)
    assert 700 < silent.max() <= 800
    assert silent.min() < 50


def test_frequency_masks_on_waveforms_are_refused() -> None:
    with pytest.raises(ConfigError, match="frequency_masks blank mel bins"):
        changed(SpeechAugment(frequency_masks=1))


def test_silence_stays_finite() -> None:
    for spec in (LOG_MEL, WHISPER, SpeechInput(max_seconds=3.0, features="waveform", normalise_waveform=True)):
        for wave in (np.zeros(400, np.int16), np.zeros(16_000, np.int16)):
            prepared = prepare_speech(collate_speech([wave], spec), spec, SpeechAugment(gain_db=3, noise=0.1), torch.tensor([1]))
            assert all(torch.isfinite(tensor).all() for tensor in prepared.values())
