"""Fingerprints of media: what two samples must share to be the same, or nearly.

- the bytes: sha256 of image and recording, from the sidecar; nothing is decoded for it
- a picture: 64 bits of its low frequencies (pHash, Zauner 2010: DCT of the 32 × 32 grey picture, its 8 × 8 lowest frequencies against
  their median). Pictures that are only scaled, encoded anew or slightly recoloured differ in few bits. Pictures without contrast have none
- a recording: sha256 of its decoded 16-bit samples: the same sound as FLAC and as WAV is the same, a resampled one is not
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageOps

from clipscale.data.media import check_size
from clipscale.data.shards import Sample, ShardError, open_dataset
from data_tools.pool import Count
from data_tools.tally import Progress

_SIDE, _LOW = 32, 8
_LEAST_CONTRAST = 2.0  # standard deviation of grey levels, of 255
_READ = 64


@dataclass(frozen=True)
class PrintJob:
    """Fingerprints of one shard, to be taken."""

    url: str
    shard: int
    near: bool
    """Decode media; else only the bytes' hashes are taken, from the sidecar."""


@dataclass(frozen=True)
class Prints:
    """Fingerprints of samples; row i of every array is sample i."""

    media: np.ndarray
    """uint64 [n, 2]: half of the sha256 of the media's bytes."""
    picture: np.ndarray
    """uint64 [n]: the picture's 64 bits."""
    has_picture: np.ndarray
    """bool [n]: False where there is no picture, or one without contrast."""
    sound: np.ndarray
    """uint64 [n, 2]: half of the sha256 of the decoded recording; zeros where there is none."""
    unreadable: int = 0
    """Samples that could not be decoded; they count by their bytes alone."""


def take_prints(job: PrintJob, count: Count) -> tuple[str, int, Prints]:
    """The fingerprints of a shard."""
    index = open_dataset(job.url)
    digests = index.sidecar(job.shard).columns["sha256"]
    size = len(digests)
    media = np.frombuffer(b"".join(digest[:16] for digest in digests), np.uint64).reshape(size, 2)
    picture, has_picture, sound = np.zeros(size, np.uint64), np.zeros(size, bool), np.zeros((size, 2), np.uint64)
    unreadable = 0
    for begin in range(0, size if job.near else 0, _READ):
        rows = range(begin, min(begin + _READ, size))
        for row, sample in zip(rows, index.read(job.shard, rows), strict=True):
            try:
                _note(sample, row, picture, has_picture, sound)
                count(Progress(1))
            except Exception:  # whatever a decoder says of damaged media: `verify` tells more
                unreadable += 1
                has_picture[row] = False
                count(Progress(1, reasons={"unreadable sample": 1}))
    if not job.near:
        count(Progress(size))
    return job.url, job.shard, Prints(media, picture, has_picture, sound, unreadable)


def _note(sample: Sample | ShardError, row: int, picture: np.ndarray, has_picture: np.ndarray, sound: np.ndarray) -> None:
    if isinstance(sample, ShardError):
        raise sample
    if sample.image is not None:
        bits = picture_bits(sample.image)
        picture[row], has_picture[row] = bits or 0, bits is not None
    if sample.speech is not None:
        sound[row] = np.frombuffer(sound_digest(sample.speech)[:16], np.uint64)


def picture_bits(data: bytes) -> int | None:
    """The 64 bits of a picture's low frequencies; None when it has no contrast.

    Raises:
        ShardError, OSError, ValueError: it cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture that is wrong in small things still has a fingerprint
        picture: Any = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
        check_size(*picture.size)
        picture.draft("L", (4 * _SIDE, 4 * _SIDE))
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    if grey.std() < _LEAST_CONTRAST:
        return None
    low = _DCT @ grey @ _DCT.T
    return int.from_bytes(np.packbits((low > np.median(low)).reshape(-1)).tobytes(), "big")


def _dct_rows() -> np.ndarray:
    """The first rows of the orthonormal DCT-II of length 32: float64 [8, 32]."""
    place, frequency = np.arange(_SIDE), np.arange(_LOW)[:, None]
    rows: np.ndarray = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    rows[0] /= np.sqrt(2)
    return rows


_DCT = _dct_rows()


def sound_digest(data: bytes) -> bytes:
    """sha256 of a recording's decoded samples, its rate and its channels."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        digest = hashlib.sha256(f"{file.samplerate} {file.channels} ".encode())
        for block in file.blocks(max(1, file.samplerate), dtype="int16"):
            digest.update(block.tobytes())
    return digest.digest()
