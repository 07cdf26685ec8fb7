"""Pictures: decoded and made square on the CPU as uint8; augmented and normalised on the device.

b images, S = spec.size pixels a side.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from clipscale.data.media import check_size, image_suffix
from clipscale.data.random_numbers import between
from clipscale.errors import ShardError
from clipscale.settings import Settings

if TYPE_CHECKING:
    from clipscale.inputs import ImageInput

_ORIENTATION = 0x0112
_EXIF_WITHIN = 65_536  # a JPEG's EXIF segment stands in front and is at most this long
_GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision and Pillow


class ImageAugment(Settings):
    """Random changes of training images, drawn anew for every sample and epoch; one affine resampling does all geometry."""

    min_area: float = Field(default=0.9, gt=0, le=1)
    """Show a random crop of at least this share of the area (open_clip's default)."""
    max_stretch: float = Field(default=1.0, ge=1)
    """Largest ratio by which the crop's width and height may differ; 1.333 is the usual choice for photographs."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Rotate by up to this angle, either way."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Move by up to this share of the side, each way, beyond what the crop moves; the border's pixels fill the gap."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Multiply pixels by 1 ± up to this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Scale the distance from the image's mean by 1 ± up to this."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Scale the distance from the image's grey by 1 ± up to this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Turn colours by up to this share of the colour circle, either way."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Probability of an image without colour."""


def decode_image(data: bytes, spec: ImageInput) -> Tensor:
    """A stored picture as the tower wants it: uint8 [3, S, S].

    Transparency is laid over white, 16-bit samples keep their high byte, EXIF rotation is applied, of an animation the
    first frame is taken.

    Raises:
        ShardError: it is no picture, is damaged, or is too large; the message says which.
    """
    suffix = image_suffix(data)
    try:
        pixels = _decode_jpeg(data, spec.size) if suffix == "jpg" else _decode_with_pillow(data)
    except ShardError:
        raise
    except Exception as error:
        raise ShardError(f"the {suffix} picture is damaged: {error}") from error
    return make_square(torch.from_numpy(pixels).permute(2, 0, 1), spec)


def _decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """RGB uint8 [H, W, 3]; scaled down by 2, 4 or 8 while decoding when that leaves at least `size` on the shorter side."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    check_size(width, height)
    if colours in ("CMYK", "YCCK"):
        return _decode_with_pillow(data)
    factor = next((factor for factor in (8, 4, 2) if min(height, width) // factor >= size), 1)
    least = (math.ceil(height / factor), math.ceil(width / factor)) if factor > 1 else (0, 0)
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=least[0], min_width=least[1])
    return _upright(pixels, data) if b"Exif\0\0" in data[:_EXIF_WITHIN] else pixels


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    orientation = _open(data).getexif().get(_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures (check_size judges) and of odd EXIF data
        picture = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    check_size(*picture.size)
    return picture


def _decode_with_pillow(data: bytes) -> np.ndarray:
    picture = _open(data)
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: convert("RGB") would clip it to white
        grey = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.getexif():
        picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        picture = Image.alpha_composite(white, over)
    return np.array(picture.convert("RGB"))


def make_square(pixels: Tensor, spec: ImageInput) -> Tensor:
    """Any picture to the tower's size: uint8 [3, H, W] -> contiguous uint8 [3, S, S]."""
    size, (height, width) = spec.size, pixels.shape[1:]
    if (height, width) != (size, size):
        rows, columns = _fitted(height, width, spec)
        pixels = _resized(pixels, rows, columns, spec.interpolation)
        pixels = _padded(pixels, size) if spec.fit == "pad" else _centre(pixels, size)
    return pixels.contiguous()


def _fitted(height: int, width: int, spec: ImageInput) -> tuple[int, int]:
    """Height and width after resizing, before cropping or padding."""
    if spec.fit == "squash":
        return spec.size, spec.size
    side = max(height, width) if spec.fit == "pad" else min(height, width)
    return max(1, spec.size * height // side), max(1, spec.size * width // side)


def _resized(pixels: Tensor, rows: int, columns: int, interpolation: str) -> Tensor:
    if pixels.shape[1:] == (rows, columns):
        return pixels
    return functional.interpolate(pixels[None], (rows, columns), mode=interpolation, antialias=True, align_corners=False)[0]


def _centre(pixels: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _padded(pixels: Tensor, size: int) -> Tensor:
    top, left = ((size - side) // 2 for side in pixels.shape[1:])
    return functional.pad(pixels, (left, size - pixels.shape[2] - left, top, size - pixels.shape[1] - top))


def prepare_images(pixels: Tensor, spec: ImageInput, augment: ImageAugment | None = None, seeds: Tensor | None = None) -> dict[str, Tensor]:
    """Pixels as the tower is fed, on the device they are on: uint8 [b, 3, S, S] -> `pixels` float32 [b, 3, S, S], normalised.

    `augment` needs `seeds`, int64 [b]; what happens to a sample depends on its seed alone.
    """
    scaled = pixels.float() / 255
    if augment is not None:
        assert seeds is not None, "augmentation is keyed by the batch's seeds"
        scaled = _recoloured(_moved(scaled, augment, seeds), augment, seeds)
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (spec.mean, spec.std))
    return {"pixels": (scaled - mean) / std}


def _moved(pixels: Tensor, augment: ImageAugment, seeds: Tensor) -> Tensor:
    """Crop, stretch, rotate, shift and flip in one resampling."""
    if augment.min_area == 1 and augment.max_stretch == 1 and not (augment.rotation_degrees or augment.shift or augment.flip):
        return pixels
    grid = functional.affine_grid(_affine(augment, seeds), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _affine(augment: ImageAugment, seeds: Tensor) -> Tensor:
    """Where each shown point comes from, in coordinates from -1 to 1: [b, 2, 3]."""

    def draw(low: float, high: float, purpose: str) -> Tensor:
        return between(seeds, low, high, purpose=f"image/{purpose}")

    side = draw(augment.min_area, 1, "area").sqrt()
    stretch = (draw(-1, 1, "stretch") * (math.log(augment.max_stretch) / 2)).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    angle = draw(-1, 1, "rotation") * math.radians(augment.rotation_degrees)
    mirror = torch.where(draw(0, 1, "flip") < augment.flip, -1.0, 1.0)
    across = draw(-1, 1, "across") * (1 - width) + draw(-1, 1, "shift across") * 2 * augment.shift
    down = draw(-1, 1, "down") * (1 - height) + draw(-1, 1, "shift down") * 2 * augment.shift
    first = torch.stack([mirror * width * angle.cos(), -height * angle.sin(), across], dim=1)
    second = torch.stack([mirror * width * angle.sin(), height * angle.cos(), down], dim=1)
    return torch.stack([first, second], dim=1)


def _recoloured(pixels: Tensor, augment: ImageAugment, seeds: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, then perhaps no colour at all; what is not asked for costs nothing."""

    def draw(reach: float, purpose: str) -> Tensor:
        return between(seeds, 1 - reach, 1 + reach, purpose=f"image/{purpose}")[:, None, None, None]

    if augment.brightness:
        pixels = pixels * draw(augment.brightness, "brightness")
    if augment.contrast:
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * draw(augment.contrast, "contrast")
    if augment.saturation:
        grey = _grey(pixels)
        pixels = grey + (pixels - grey) * draw(augment.saturation, "saturation")
    if augment.brightness or augment.contrast or augment.saturation:
        pixels = pixels.clamp(0, 1)
    if augment.hue:
        pixels = turn_hue(pixels, between(seeds, -augment.hue, augment.hue, purpose="image/hue"))
    if augment.grayscale:
        without = between(seeds, 0, 1, purpose="image/grayscale") < augment.grayscale
        pixels = torch.where(without[:, None, None, None], _grey(pixels), pixels)
    return pixels


def _grey(pixels: Tensor) -> Tensor:
    """[b, 3, S, S] -> [b, 1, S, S]"""
    weights = torch.tensor(_GREY, device=pixels.device)[:, None, None]
    return (pixels * weights).sum(dim=1, keepdim=True)


def turn_hue(pixels: Tensor, share: Tensor) -> Tensor:
    """Turn each image's colours by a share of the colour circle (HSV): [b, 3, S, S] from 0 to 1, [b]."""
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    some = chroma.clamp(min=1e-12)  # grey has no hue, and keeps none
    sixth = torch.where(value == red, (green - blue) / some, torch.where(value == green, (blue - red) / some + 2, (red - green) / some + 4))
    starts = torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[:, None, None]
    place = ((sixth + 6 * share[:, None, None])[:, None] + starts) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)
