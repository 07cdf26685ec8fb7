"""Images as they are packed: kept byte for byte when they can be, upright and not larger than asked, or refused."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from clipscale.data.media import MAX_PIXELS, MAX_SIDE
from clipscale.data.shards import image_size, image_suffix
from clipscale.errors import ShardError
from data_tools.packing import BadRow, Packing

_JPEG_QUALITY = 95
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""
_STORED_FORMATS = ["JPEG", "PNG", "WEBP"]
_JPEG_MODES = {"L": "GRAY", "RGB": "RGB"}
_OTHER_FORMATS = ["BMP", "GIF", "TIFF", "AVIF"]  # stored as PNG; never formats that run programs or read other files
_ENDS = {"jpg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}


def pack_image(data: bytes, packing: Packing) -> bytes:
    """The image to store: jpg, png or webp.

    Raises:
        BadRow: it cannot be read, is cut off, or is larger than any reader decodes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of either fails below or does not matter
            return _pack(data, packing)
    except ShardError as error:
        raise BadRow("unreadable image", str(error)) from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadRow("unreadable image", str(error)) from error


def _pack(data: bytes, packing: Packing) -> bytes:
    if not _is_stored_format(data):
        data = _to_png(data)
    suffix, size = image_suffix(data), image_size(data)
    header = Image.open(io.BytesIO(data), formats=_STORED_FORMATS)
    turn = _turn(header)
    if turn is not None or (packing.max_side is not None and max(size) > packing.max_side):
        picture = _shrunk(_decoded(data, suffix, header), packing.max_side)
        return _encode(picture if turn is None else picture.transpose(turn), suffix)
    if packing.check_images == "decode":
        _check_decodes(data, suffix, header)
    else:
        _check_end(data, suffix)
    return data


def check_image(data: bytes) -> None:
    """Decode a stored image: jpg, png or webp.

    Raises:
        BadRow: it cannot be decoded, or is cut off.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suffix, _ = image_suffix(data), image_size(data)
            _check_decodes(data, suffix, Image.open(io.BytesIO(data), formats=_STORED_FORMATS))
    except (ShardError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadRow("unreadable image", str(error)) from error


def _turn(header: ImageFile) -> Image.Transpose | None:
    """What turns the image upright; None when it is."""
    if header.format == "PNG" and "exif" not in header.info:
        return None  # Pillow would decode it all to look for more
    return _TURNS.get(header.getexif().get(_EXIF_ORIENTATION, 1))


def _is_stored_format(data: bytes) -> bool:
    try:
        return bool(image_suffix(data))
    except ShardError:
        return False


def _to_png(data: bytes) -> bytes:
    """The (first) picture of another format."""
    try:
        picture = Image.open(io.BytesIO(data), formats=_OTHER_FORMATS)
    except UnidentifiedImageError:
        raise ShardError(f"not a format that can be read; it has {len(data)} bytes and begins with {data[:12]!r}") from None
    width, height = picture.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ShardError(f"the picture is {width}×{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all are decoded")
    return _encode(ImageOps.exif_transpose(picture), "png")


def _check_decodes(data: bytes, suffix: str, header: ImageFile) -> None:
    if suffix == "jpg":
        _check_end(data, suffix)
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1)  # at 1/8 size; strict, where Pillow is lenient
    else:
        header.load()


def _decoded(data: bytes, suffix: str, header: ImageFile) -> Image.Image:
    if suffix == "jpg" and header.mode in _JPEG_MODES:
        _check_end(data, suffix)
        pixels = simplejpeg.decode_jpeg(data, colorspace=_JPEG_MODES[header.mode])
        return Image.fromarray(pixels.squeeze(axis=2) if pixels.shape[2] == 1 else pixels)
    return header


def _check_end(data: bytes, suffix: str) -> None:
    end = _ENDS.get(suffix)
    whole = data.rfind(end) > 0 if end else len(data) >= int.from_bytes(data[4:8], "little") + 8
    if not whole:
        raise ShardError(f"the {suffix} is cut off: it has {len(data)} bytes and no end")


def _shrunk(picture: Image.Image, max_side: int | None) -> Image.Image:
    longer = max(picture.size)
    if max_side is None or longer <= max_side:
        return picture
    width, height = (max(1, round(side * max_side / longer)) for side in picture.size)
    return _eight_bits(picture).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in a mode that resizes and encodes: L, RGB or RGBA."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if picture.mode in ("L", "RGB", "RGBA"):
        return picture
    transparent = picture.mode in ("LA", "PA", "RGBa") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def _encode(picture: Image.Image, suffix: str) -> bytes:
    """JPEG stays JPEG, everything else becomes PNG."""
    picture = _eight_bits(picture)
    stream = io.BytesIO()
    if suffix == "jpg":
        picture.convert("RGB").save(stream, "JPEG", quality=_JPEG_QUALITY)
    else:
        picture.save(stream, "PNG")
    return stream.getvalue()
