"""The pictures and recordings of examples, read from their data sets and put into the page."""

from __future__ import annotations

import base64
import io

from clipscale.data.media import image_size, image_suffix, speech_suffix
from clipscale.data.shards import DatasetIndex, open_dataset
from clipscale.errors import ClipscaleError, ShardError
from clipscale.evaluators import Item
from clipscale.report.markup import Markup, element

MOST_BYTES = 24 * 2**20
"""Bytes of media a page may hold; later examples are shown as text."""
_PICTURE_SIDE = 320
_PICTURE_BYTES = 100_000  # larger pictures are shown smaller
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "flac": "audio/flac", "wav": "audio/wav"}


class MediaShelf:
    """Media of one page: each data set is opened once, and what could not be shown is remembered."""

    def __init__(self) -> None:
        self.missing: dict[str, int] = {}
        """Why media are left out, and how many for that reason."""
        self._room = MOST_BYTES
        self._opened: dict[str, DatasetIndex | ClipscaleError] = {}

    def show(self, item: Item) -> Markup | None:
        """The item's picture or player; None for text, and for what cannot be shown."""
        if item.modality == "text" or not item.source:
            return None
        try:
            data = self._read(item)
            return self._picture(data, item) if item.modality == "image" else self._player(data, item)
        except (ClipscaleError, OSError) as error:
            self.missing[str(error)] = self.missing.get(str(error), 0) + 1
            return None

    def _read(self, item: Item) -> bytes:
        index = self._index(item.source)
        shard, row = index.find(item.key)
        sample = index.read(shard, [row])[0]
        if isinstance(sample, ShardError):
            raise sample
        data = sample.image if item.modality == "image" else sample.speech
        if data is None:
            raise ShardError(f"sample '{item.key}' of {item.source} has no {item.modality}")
        return data

    def _index(self, source: str) -> DatasetIndex:
        """The data set; one that cannot be opened is not tried again."""
        if source not in self._opened:
            try:
                self._opened[source] = open_dataset(source)
            except ClipscaleError as error:
                self._opened[source] = error
        index = self._opened[source]
        if isinstance(index, ClipscaleError):
            raise index
        return index

    def _picture(self, data: bytes, item: Item) -> Markup:
        width, height = image_size(data)
        if max(width, height) > _PICTURE_SIDE or len(data) > _PICTURE_BYTES:
            data = _smaller(data)
            width, height = image_size(data)
        coarse = "coarse" if max(width, height) <= 64 else None
        return element("img", src=self._address(image_suffix(data), data), alt=item.text, width=width, height=height, class_=coarse)

    def _player(self, data: bytes, item: Item) -> Markup:
        address = self._address(speech_suffix(data), data)
        return element("audio", controls=True, preload="metadata", src=address, aria_label=item.text)

    def _address(self, suffix: str, data: bytes) -> str:
        """The bytes as a `data:` address, while there is room for them."""
        if len(data) > self._room:
            raise ShardError(f"the page already holds {MOST_BYTES // 2**20} MiB of pictures and recordings")
        self._room -= len(data)
        return f"data:{_TYPES[suffix]};base64,{base64.b64encode(data).decode('ascii')}"


def _smaller(data: bytes) -> bytes:
    """The picture, upright, as JPEG within 320 by 320 pixels."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as picture:
        small = ImageOps.exif_transpose(picture).convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()
