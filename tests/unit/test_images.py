"""Pictures of every kind decode to what a person sees, at the tower's size; augmentation depends on its seed alone."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from making_data import encoded
from PIL import Image, ImageOps

from clipscale.data.images import ImageAugment, decode_image, prepare_images
from clipscale.errors import ShardError
from clipscale.inputs import ImageInput

SIZE = 24


def scene(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A smooth picture in which every direction and channel differs."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((255 * np.stack([across, down, (across * down) ** 2], axis=2)).astype(np.uint8))


def decoded(data: bytes, size: int = SIZE, **spec: object) -> np.ndarray:
    pixels = decode_image(data, ImageInput(size=size, **spec))  # type: ignore[arg-type]
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy()


def difference(one: np.ndarray, other: object) -> int:
    return int(np.abs(one.astype(int) - np.asarray(other).astype(int)).max())


def test_png_decodes_to_its_pixels() -> None:
    assert np.array_equal(decoded(encoded(scene())), np.asarray(scene()))


def test_webp_decodes_to_its_pixels() -> None:
    assert np.array_equal(decoded(encoded(scene(), "WEBP", lossless=True)), np.asarray(scene()))


def test_jpeg_decodes_as_pillow_does() -> None:
    data = encoded(scene(), "JPEG", quality=95)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    grey = scene().convert("L")
    pixels = decoded(encoded(grey, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert difference(pixels, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)) <= (2 if kind == "JPEG" else 0)


def test_cmyk_jpeg_has_its_colours() -> None:
    data = encoded(scene().convert("CMYK"), "JPEG", quality=95)
    assert difference(decoded(data), scene()) <= 12  # chroma subsampling; a wrong inversion is off by 100 and more


def test_palette_has_its_colours() -> None:
    palette = scene().quantize(64)
    assert np.array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_transparency_lies_over_white() -> None:
    picture = Image.new("RGBA", (SIZE, SIZE), (200, 0, 0, 128))
    picture.paste((7, 7, 7, 0), (0, 0, 5, 5))
    pixels = decoded(encoded(picture))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert difference(pixels[-1, -1], [228, 127, 127]) <= 1  # (200 · 128 + 255 · 127) / 255
    palette = Image.new("P", (SIZE, SIZE), 0)
    palette.putpalette([9, 9, 9])
    assert decoded(encoded(palette, transparency=0))[3, 3].tolist() == [255, 255, 255]


def test_16_bit_grey_keeps_its_high_byte() -> None:
    values = (np.asarray(scene().convert("L")).astype(np.uint16) << 8) + 77
    pixels = decoded(encoded(Image.fromarray(values)))
    assert np.array_equal(pixels[:, :, 0], values >> 8)


def png_of(rows: bytes, bits: int, colour: int, side: int = SIZE) -> bytes:
    """A PNG written by hand, for kinds that Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_keeps_its_high_byte() -> None:
    values = (np.asarray(scene()).astype(np.uint16) << 8) + 77
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.array_equal(decoded(png_of(rows, 16, 2)), np.asarray(scene()))


def test_black_and_white_is_black_and_white() -> None:
    picture = scene().convert("1")
    assert np.array_equal(decoded(encoded(picture))[:, :, 1], 255 * np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), kind, exif=exif, **{"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[kind])
    assert np.array_equal(decoded(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [scene(), ImageOps.invert(scene())]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decoded(data), np.asarray(scene()))


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (97, 97), (30, 400), (13, 17)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_and_centre_crop_equal_torchvision_on_pillow(shape: tuple[int, int], interpolation: str) -> None:
    from torchvision.transforms import v2

    picture = scene(*shape)
    wanted = v2.Compose([v2.Resize(SIZE, interpolation=v2.InterpolationMode(interpolation)), v2.CenterCrop(SIZE)])(picture)
    assert difference(decoded(encoded(picture), interpolation=interpolation), wanted) <= 1  # rounding of uint8 weights


def test_squash_and_pad_keep_the_whole_picture() -> None:
    picture = scene(48, 24)
    assert difference(decoded(encoded(picture), fit="squash"), picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) <= 1
    padded = decoded(encoded(picture), fit="pad")
    assert difference(padded[6:18], picture.resize((SIZE, SIZE // 2), Image.Resampling.BICUBIC)) <= 1
    assert not padded[:6].any()
    assert not padded[18:].any()


@pytest.mark.parametrize("sides", [(192, 192), (97, 250), (250, 97), (60, 70), (399, 401)])
def test_large_jpegs_are_scaled_while_decoding_as_pillow_drafts_them(sides: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (sides[1], sides[0], 3), dtype=np.uint8))
    data = encoded(noise, "JPEG", quality=95)
    drafted = Image.open(io.BytesIO(data))
    factor = max(factor for factor in (1, 2, 4, 8) if min(sides) // factor >= SIZE)
    drafted.draft("RGB", (sides[0] // factor, sides[1] // factor))
    drafted.load()
    assert drafted.width == -(-sides[0] // factor)
    wanted = v2.Compose([v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])(drafted)
    assert difference(decoded(data), wanted) <= 1


def test_extreme_shapes_decode() -> None:
    for fit in ("crop", "squash", "pad"):
        decoded(encoded(scene(1, 300)), fit=fit)
        decoded(encoded(scene(300, 1)), fit=fit)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"GIF89a....", "not a jpg, png or webp picture"),
        (b"\x80\x04\x95pickle", "not a jpg, png or webp picture"),
        (encoded(scene())[:-40], "the png picture is damaged"),
        (encoded(scene(80, 80), "JPEG", quality=95)[:-600], "the jpg picture is damaged"),
        (encoded(scene(), "WEBP")[:40], "the webp picture is damaged"),
        (b"\xff\xd8\xff\xe0 nothing", "the jpg picture is damaged"),
    ],
)
def test_damaged_pictures_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        decode_image(data, ImageInput(size=SIZE))


@pytest.mark.parametrize("side", [10_000, 20_000, 40_000])
def test_bombs_are_refused_before_they_unfold(side: int) -> None:
    """A PNG of zeros: 100 MB to 1.6 GB of pixels in at most 1.6 MB."""
    bomb = png_of(bytes(side), 8, 0, side=side)  # one row; the header alone must be enough
    begin = time.process_time()
    with pytest.raises(ShardError, match=f"{side}×{side} pixels; at most|exceeds limit"):
        decode_image(bomb, ImageInput(size=SIZE))
    assert time.process_time() - begin < 0.5  # reading the header takes 1 ms


def batch(count: int = 6) -> torch.Tensor:
    return torch.stack([decode_image(encoded(scene()), ImageInput(size=SIZE))] * count)


def test_without_augmentation_pixels_are_only_normalised() -> None:
    spec = ImageInput(size=SIZE, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = prepare_images(batch(), spec)["pixels"]
    by_hand = (np.asarray(scene()) / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 2.0]
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[3].permute(1, 2, 0), by_hand, atol=1e-6)


EVERYTHING = ImageAugment(
    min_area=0.5,
    max_stretch=1.3,
    rotation_degrees=20,
    shift=0.1,
    flip=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    grayscale=0.3,
)
PLAIN = ImageInput(size=SIZE, mean=(0, 0, 0), std=(1, 1, 1))


def test_augmentation_depends_on_the_seed_alone() -> None:
    seeds = torch.tensor([5, -7, 5, 2**62, 0, 1])
    together = prepare_images(batch(), PLAIN, EVERYTHING, seeds)["pixels"]
    alone = torch.cat([prepare_images(batch(1), PLAIN, EVERYTHING, seeds[row : row + 1])["pixels"] for row in range(6)])
    assert torch.equal(together, alone)
    assert torch.equal(together[0], together[2])
    assert all(not torch.allclose(together[0], together[row], atol=0.01) for row in (1, 3, 4, 5))


def test_augmentation_that_may_change_nothing_changes_nothing() -> None:
    nothing = ImageAugment(min_area=1.0)
    assert torch.equal(prepare_images(batch(), PLAIN, nothing, torch.arange(6))["pixels"], prepare_images(batch(), PLAIN)["pixels"])


def test_a_certain_flip_is_a_mirror_image() -> None:
    flipped = prepare_images(batch(2), PLAIN, ImageAugment(min_area=1.0, flip=1.0), torch.arange(2))["pixels"]
    np.testing.assert_allclose(flipped, prepare_images(batch(2), PLAIN)["pixels"].flip(3), atol=1e-5)


def test_flips_come_as_often_as_asked() -> None:
    pixels = prepare_images(batch(1).expand(2000, -1, -1, -1), PLAIN, ImageAugment(min_area=1.0, flip=0.25), torch.arange(2000))["pixels"]
    share = (pixels[:, 0, 12, 0] > 0.5).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.04)  # four standard deviations


@pytest.mark.parametrize(("what", "reach"), [("saturation", 0.8), ("hue", 0.5), ("brightness", 0.5)])
def test_colours_change_as_torchvisions(what: str, reach: float) -> None:
    from torchvision.transforms import functional

    from clipscale.data.random_numbers import between

    seeds = torch.arange(8)
    noise = torch.randint(0, 256, (8, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise[0] = 77  # grey stays grey
    changed = prepare_images(noise, PLAIN, ImageAugment(min_area=1.0, **{what: reach}), seeds)["pixels"]
    centre = 0 if what == "hue" else 1
    factors = between(seeds, centre - reach, centre + reach, purpose=f"image/{what}").tolist()
    change = getattr(functional, f"adjust_{what}")
    wanted = torch.stack([change(image / 255, factor) for image, factor in zip(noise, factors, strict=True)])
    torch.testing.assert_close(changed, wanted, atol=2e-4, rtol=0)  # torchvision's weights of grey are rounded otherwise
    assert (changed - prepare_images(noise, PLAIN)["pixels"]).abs().max() > 0.1


def test_grayscale_comes_as_often_as_asked_and_leaves_the_others_alone() -> None:
    augment, many = ImageAugment(min_area=1.0, grayscale=0.25), batch(1).expand(1000, -1, -1, -1)
    pixels, plain = prepare_images(many, PLAIN, augment, torch.arange(1000))["pixels"], prepare_images(batch(1), PLAIN)["pixels"]
    grey = (pixels == pixels[:, :1]).flatten(1).all(1)
    assert grey.float().mean().item() == pytest.approx(0.25, abs=0.055)  # four standard deviations
    assert torch.equal(pixels[~grey], plain.expand(int((~grey).sum()), -1, -1, -1))
    by_hand = 0.2989 * plain[:, 0] + 0.587 * plain[:, 1] + 0.114 * plain[:, 2]
    torch.testing.assert_close(pixels[grey][:1, 0], by_hand, atol=1e-6, rtol=0)


def test_rotation_turns_about_the_centre_and_keeps_shapes() -> None:
    """A quarter turn, found by looking for the seed that draws (nearly) 90 degrees."""
    from clipscale.data.random_numbers import between

    seeds = torch.arange(20_000)
    angles = between(seeds, -1, 1, purpose="image/rotation") * 90
    seed = seeds[angles.argmax()][None]
    turned = prepare_images(batch(1), PLAIN, ImageAugment(min_area=1.0, rotation_degrees=90), seed)["pixels"][0]
    upright = prepare_images(batch(1), PLAIN)["pixels"][0]
    closest = min((turned - upright.rot90(times, (1, 2))).abs().max().item() for times in (1, 3))
    assert closest < 0.02


def test_crops_cover_the_area_asked_for() -> None:
    """A crop shows a ramp's values: its slope tells the side, the square of the side the area."""
    spec = ImageInput(size=64, mean=(0, 0, 0), std=(1, 1, 1))
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(500, 3, 64, 64)
    shown = prepare_images(ramp, spec, ImageAugment(min_area=0.5), torch.arange(500))["pixels"][:, 0, 32]
    sides = (shown[:, 40] - shown[:, 24]) * 255 / 4 / 16
    assert sides.min() ** 2 >= 0.5 - 0.01
    assert sides.max() <= 1.001
    assert (sides**2).mean() == pytest.approx(0.75, abs=0.03)
