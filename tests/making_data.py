"""Small real data for tests: encoded pictures and recordings, and data sets of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from clipscale.data.shards import ShardWriter, write_index


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(number: int, size: int = 8) -> bytes:
    """A one-coloured picture whose red is number % 256 and whose green is number // 256."""
    return encoded(Image.new("RGB", (size, size), (number % 256, number // 256, 0)))


def recording(wave: np.ndarray, rate: int = 16_000, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    """Samples [n] or [n, channels] as a file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def tone(seconds: float, *, hertz: float = 440.0, rate: int = 16_000) -> np.ndarray:
    """A sine of amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_dataset(folder: Path, sizes: list[int], *, speech: bool = False) -> Path:
    """An indexed data set of shards of these sizes; sample n over all has the key %06d of n and the captions 'n' and 'number n'."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, f"{shard:06d}") as writer:
            for _ in range(size):
                sound = recording(tone(0.05 + 0.001 * number, hertz=200 + number)) if speech else None
                captions = [f"{number}", f"number {number}"]
                writer.write(f"{number:06d}", captions=captions, image=png(number), speech=sound, record={"label": number})
                number += 1
        shards.append(writer.info)
    write_index(folder, shards)
    return folder
