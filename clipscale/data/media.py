"""Pictures and recordings as bytes: what kind they are and how large, told from the header before anything is decoded."""

from __future__ import annotations

import io
import warnings

from clipscale.errors import ShardError

MAX_SIDE = 16_384
"""Longest side of a picture that is decoded, pixels."""
MAX_PIXELS = 64_000_000
"""Most pixels of a picture that is decoded: 192 MB as RGB."""

IMAGE_SUFFIXES = ("jpg", "png", "webp")
SPEECH_SUFFIXES = ("flac", "wav")


def image_suffix(data: bytes) -> str:
    """`jpg`, `png` or `webp`, from the first bytes.

    Raises:
        ShardError: it is none of them.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ShardError(f"not a jpg, png or webp picture: {_beginning(data)}")


def speech_suffix(data: bytes) -> str:
    """`flac` or `wav`, from the first bytes.

    Raises:
        ShardError: it is neither.
    """
    if data[:4] == b"fLaC":
        return "flac"
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    raise ShardError(f"not a flac or wav recording: {_beginning(data)}")


def _beginning(data: bytes) -> str:
    return f"it has {len(data)} bytes and begins with {data[:12]!r}" if data else "it is empty"


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header, as stored (an EXIF rotation is not applied).

    Raises:
        ShardError: no picture, a damaged header, or more pixels than are ever decoded.
    """
    suffix = image_suffix(data)
    try:
        width, height = _jpeg_size(data) if suffix == "jpg" else _pillow_size(data)
    except Exception as error:
        raise ShardError(f"damaged {suffix} header: {error}") from error
    check_size(width, height)
    return width, height


def check_size(width: int, height: int) -> None:
    """Refuse pictures that would take too much memory once decoded.

    Raises:
        ShardError: the picture is too large.
    """
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ShardError(f"the picture is {width}×{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all are decoded")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return width, height


def _pillow_size(data: bytes) -> tuple[int, int]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limits above judge
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as picture:
            return picture.size


def speech_length(data: bytes) -> tuple[int, int]:
    """Frames (samples per channel) and sample rate in hertz, from the header.

    Raises:
        ShardError: no recording, a damaged header, or no frames.
    """
    suffix = speech_suffix(data)
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            frames, rate = file.frames, file.samplerate
    except soundfile.LibsndfileError as error:
        raise ShardError(f"damaged {suffix} header: {error}") from error
    if not 0 < frames < 2**62:
        raise ShardError(f"the {suffix} recording has no frames")
    return frames, rate
