"""Recordings as they are packed: 16 kHz mono FLAC of 16 bits, whatever they were.

Resampled once here, by soxr at high quality, so that training decodes and nothing more.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from data_tools.packing import BadRow, Packing

SAMPLE_RATE = 16_000
_MAX_CHANNELS = 32


def pack_speech(data: bytes, packing: Packing) -> bytes:
    """The recording to store: mono FLAC at 16 kHz; kept byte for byte when it is that already.

    Raises:
        BadRow: it cannot be read, is empty, holds no numbers, or is longer or shorter than asked.
    """
    _check_end(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_length(file, packing)
            samples = _samples(file)
            kept = (file.format, file.samplerate, file.channels, file.subtype) == ("FLAC", SAMPLE_RATE, 1, "PCM_16")
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise BadRow("unreadable recording", f"{_reason(error)}; it has {len(data)} bytes and begins with {data[:12]!r}") from error
    if not len(samples):
        raise BadRow("empty recording", "it holds no sound")
    return data if kept else _encode(samples)


def check_recording(data: bytes) -> None:
    """Decode a stored recording, a second at a time.

    Raises:
        BadRow: it cannot be decoded, or is cut off.
    """
    _check_end(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            heard = sum(len(block) for block in file.blocks(max(1, file.samplerate), dtype="float32"))
            if heard != file.frames:
                raise BadRow("unreadable recording", f"it is cut off: its header promises {file.frames} frames, it holds {heard}")
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise BadRow("unreadable recording", _reason(error)) from error


def _reason(error: Exception) -> str:
    return str(error).replace("Error opening <_io.BytesIO object", "Error opening the file").partition(" at 0x")[0]


def _check_end(data: bytes) -> None:
    """libsndfile reads a WAV file that was cut off as if it were a shorter one."""
    promised = int.from_bytes(data[4:8], "little") + 8
    streamed = promised >= 0x7FFF_0000  # programs that write to a pipe cannot know the size
    if data[:4] == b"RIFF" and not streamed and promised > len(data) + 1:
        raise BadRow("unreadable recording", f"it is cut off: its header promises {promised} bytes, it has {len(data)}")


def _check_length(file: soundfile.SoundFile, packing: Packing) -> None:
    seconds = file.frames / file.samplerate
    if seconds > packing.max_seconds:  # from the header, before anything is decoded: 4 h of silence is a FLAC of 700 kB
        raise BadRow("recording too long", f"it lasts {seconds:.1f} s; at most {packing.max_seconds:g} s are packed")
    if file.frames and seconds < packing.min_seconds:
        raise BadRow("recording too short", f"it lasts {seconds:.2f} s; at least {packing.min_seconds:g} s are packed")
    if file.channels > _MAX_CHANNELS:
        raise BadRow("unreadable recording", f"it has {file.channels} channels; at most {_MAX_CHANNELS} are read")


def _samples(file: soundfile.SoundFile) -> np.ndarray:
    """int16 samples at 16 kHz, channels averaged."""
    most = file.frames
    if (file.samplerate, file.channels, file.subtype) == (SAMPLE_RATE, 1, "PCM_16"):
        return _whole(file.read(most, dtype="int16"), most)
    sound = _whole(file.read(most, dtype="float32", always_2d=True), most).mean(axis=1, dtype=np.float32)
    if not np.isfinite(sound).all():
        raise BadRow("unreadable recording", "it holds values that are not numbers")
    if file.samplerate != SAMPLE_RATE and len(sound):
        sound = soxr.resample(sound, file.samplerate, SAMPLE_RATE, quality="HQ")
    samples: np.ndarray = np.clip(np.rint(sound * 32_768), -32_768, 32_767).astype(np.int16)
    return samples


def _whole(samples: np.ndarray, frames: int) -> np.ndarray:
    if len(samples) < frames:
        raise BadRow("unreadable recording", f"it is cut off: its header promises {frames} frames, it holds {len(samples)}")
    return samples


def _encode(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()
