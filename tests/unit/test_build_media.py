"""Media as they are packed: what is kept, what is changed and how, what is refused."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_tools.images import pack_image
from data_tools.packing import BadRow, Packing
from data_tools.speech import pack_speech


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def halves(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_that_need_no_change_are_kept_byte_for_byte(kind: str) -> None:
    data = encoded(halves(), kind)
    assert pack_image(data, Packing()) == data
    assert pack_image(data, Packing(max_side=64)) == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_larger_images_shrink_to_the_longer_side_and_keep_their_shape(kind: str) -> None:
    packed = decoded(pack_image(encoded(halves((200, 100)), kind), Packing(max_side=50)))
    assert packed.size == (50, 25)
    pixels = np.asarray(packed.convert("RGB")).astype(int)
    assert np.abs(pixels[12, 5] - (255, 0, 0)).max() < 12  # JPEG at quality 95
    assert np.abs(pixels[12, 45] - (0, 0, 255)).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_that_lie_on_their_side_are_turned_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90° clockwise
    packed = decoded(pack_image(encoded(halves((64, 48)), kind, exif=exif), Packing()))
    assert packed.size == (48, 64)
    assert packed.getexif().get(0x0112, 1) == 1
    assert packed.getpixel((24, 5))[0] > 200  # type: ignore[index]  # left came to the top: red
    assert packed.getpixel((24, 58))[2] > 200  # type: ignore[index]


@pytest.mark.parametrize(
    "before", [b"\xff\xfe\xea\x60" + bytes(59_998), b"\xff\xff\xfe\x00\x04\xff\xda"], ids=["long comment", "fill byte"]
)
def test_orientation_is_found_behind_whatever_else_a_jpeg_begins_with(before: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(halves((64, 48)), "JPEG", exif=exif)
    assert decoded(pack_image(data[:2] + before + data[2:], Packing())).size == (48, 64)


@pytest.mark.parametrize(
    ("resize", "size", "became"),
    [
        ("longer:100", (300, 200), (100, 67)),
        ("longer:100", (90, 60), (90, 60)),
        ("shorter:100", (300, 200), (150, 100)),
        ("shorter:100", (300, 90), (300, 90)),
        ("exact:40x60", (300, 200), (40, 60)),
        ("exact:40", (40, 40), (40, 40)),
        ("crop:50x100", (300, 200), (50, 100)),
        ("crop:64", (30, 20), (64, 64)),
        ("border:64x32", (300, 200), (64, 32)),
        ("border:64", (30, 20), (64, 64)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_way_of_resizing_gives_its_size(kind: str, resize: str, size: tuple[int, int], became: tuple[int, int]) -> None:
    data = encoded(halves(size), kind)
    packed = pack_image(data, Packing(resize=resize))
    assert decoded(packed).size == became
    assert (packed == data) == (size == became)


def test_cropping_keeps_the_middle_and_a_border_is_white_around_the_whole() -> None:
    wide = encoded(halves((400, 100)), "PNG")
    cropped, bordered = (np.asarray(decoded(pack_image(wide, Packing(resize=mode)))) for mode in ("crop:100", "border:100"))
    assert (cropped[50, 20].tolist(), cropped[50, 80].tolist()) == ([255, 0, 0], [0, 0, 255])
    assert bordered[5, 50].tolist() == bordered[95, 50].tolist() == [255, 255, 255]
    assert (bordered[50, 5].tolist(), bordered[50, 95].tolist()) == ([255, 0, 0], [0, 0, 255])
    assert (bordered.min(axis=(1, 2)) < 255).sum() == 25  # of 100 lines: 400 × 100 became 100 × 25


def test_a_photo_on_its_side_is_measured_and_resized_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(halves((64, 48)), "JPEG", exif=exif)
    assert decoded(pack_image(data, Packing(resize="exact:24x80"))).size == (24, 80)
    assert decoded(pack_image(data, Packing(resize="longer:32"))).size == (24, 32)


@pytest.mark.parametrize("side", [33, 64, 100, 200])
def test_shrinking_a_large_jpeg_is_as_good_as_shrinking_all_its_pixels(side: int) -> None:
    smooth = Image.effect_noise((16, 12), 90).convert("RGB").resize((1_024, 768), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    packed = np.asarray(decoded(pack_image(data, Packing(max_side=side, image_format="png")))).astype(int)
    reference = decoded(data).resize(packed.shape[1::-1], Image.Resampling.HAMMING)
    assert np.abs(packed - np.asarray(reference)).mean() < 1.0  # of 255 levels


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP"])
def test_images_become_the_format_asked_for_and_those_that_are_it_stay_bytes(source: str, suffix: Any, kind: str) -> None:
    data = encoded(halves(), source)
    packed = pack_image(data, Packing(image_format=suffix))
    assert decoded(packed).format == kind
    assert (packed == data) == (source == kind)


def test_quality_encodes_every_jpeg_and_webp_anew_and_no_png() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "WEBP"):
        small, large = (len(pack_image(encoded(noise, kind, quality=90), Packing(quality=quality))) for quality in (20, 100))
        assert small < len(encoded(noise, kind, quality=90)) < large
    assert pack_image(encoded(noise, "PNG"), Packing(quality=20)) == encoded(noise, "PNG")


def test_transparency_lies_over_white_where_jpeg_cannot_hold_it() -> None:
    packed = decoded(pack_image(encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "PNG"), Packing(image_format="jpg")))
    assert packed.getpixel((16, 16)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_side": 49}, "image too small: it has 64×48 pixels; its shorter side must have 49"),
        ({"max_pixels": 3_071}, "image too large: it has 64×48 pixels"),
        ({"max_aspect": 1.3}, "image too elongated: it has 64×48 pixels; at most 1.3 to 1"),
    ],
)
def test_images_beyond_the_limits_are_left_out_before_they_are_decoded(limits: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pack_image(encoded(halves(), "JPEG")[:-2], Packing(**limits))
    exact = {"min_side": 48, "max_pixels": 3_072, "max_aspect": 64 / 48}
    assert pack_image(encoded(halves(), "JPEG"), Packing(**exact))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_other_formats_become_png_without_loss(kind: str) -> None:
    packed = decoded(pack_image(encoded(halves(), kind), Packing()))
    assert packed.format == "PNG"
    assert np.array_equal(np.asarray(packed.convert("RGB")), np.asarray(halves()))


def test_sixteen_bit_grey_is_scaled_and_not_clipped_when_shrunk() -> None:
    grey = Image.fromarray(np.full((40, 40), 0x8040, np.uint16))
    packed = decoded(pack_image(encoded(grey, "PNG"), Packing(max_side=20)))
    assert packed.getpixel((10, 10)) == 0x80


def test_transparency_survives_shrinking() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    for picture in (clear, clear.convert("LA"), clear.quantize(4)):
        packed = decoded(pack_image(encoded(picture, "PNG"), Packing(max_side=20)))
        assert packed.getpixel((10, 10))[-1] == 0  # type: ignore[index]


def test_cmyk_jpegs_are_read() -> None:
    data = encoded(halves().convert("CMYK"), "JPEG")
    assert pack_image(data, Packing()) == data
    assert decoded(pack_image(data, Packing(max_side=32))).mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_images_that_are_cut_off_are_refused_by_either_check(kind: str, check: Any, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(BadRow, match="unreadable image"):
        pack_image(data[: int(len(data) * share)], Packing(check_images=check))


def test_a_jpeg_damaged_inside_is_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = bytearray(encoded(noise, "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 4] = b"\xff\xd9\xff\xd9"  # ends in the middle, and goes on
    with pytest.raises(BadRow, match="unreadable image"):
        pack_image(bytes(data), Packing())


def test_a_picture_of_hundreds_of_megapixels_is_refused_by_its_header() -> None:
    header = b"IHDR" + (12_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IEND\xaeB`\x82"
    with pytest.raises(BadRow, match="12000×12000 pixels"):
        pack_image(bomb, Packing(max_side=100))
    bitmap = bytearray(encoded(halves(), "BMP"))
    bitmap[18:26] = (12_000).to_bytes(4, "little") * 2
    with pytest.raises(BadRow, match="12000×12000 pixels"):
        pack_image(bytes(bitmap), Packing(max_side=100))


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"%!PS-Adobe EPSF", b"GIF89a" + b"\0" * 20], ids=["empty", "svg", "eps", "broken gif"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(BadRow, match="unreadable image"):
        pack_image(data, Packing())


def sound(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def heard(data: bytes) -> tuple[np.ndarray, soundfile.SoundFile]:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return file.read(dtype="int16"), file


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_recordings_of_any_rate_become_16_khz_mono_flac_with_the_same_tone(rate: int, kind: str, subtype: str) -> None:
    stereo = np.stack([tone(rate), tone(rate)], axis=1)
    samples, file = heard(pack_speech(sound(stereo, rate, kind, subtype), Packing()))
    assert (file.format, file.subtype, file.samplerate, file.channels) == ("FLAC", "PCM_16", 16_000, 1)
    assert abs(len(samples) - 16_000) <= 1
    spectrum = np.abs(np.fft.rfft(samples[:16_000], 16_000))
    assert spectrum.argmax() == 440
    assert abs(np.abs(samples[2_000:14_000]).max() / 32_768 - 0.5) < 0.02  # what Vorbis makes of it; the others stay within 0.001


def test_16_khz_samples_are_kept_exactly() -> None:
    samples = np.random.default_rng(0).integers(-32_768, 32_768, 5_000).astype(np.int16)
    assert np.array_equal(heard(pack_speech(sound(samples, 16_000), Packing()))[0], samples)
    float32 = sound(samples / 32_768, 16_000, subtype="FLOAT")
    assert np.array_equal(heard(pack_speech(float32, Packing()))[0], samples)


def test_16_khz_mono_flac_is_kept_byte_for_byte() -> None:
    data = sound(tone(16_000), 16_000, "FLAC")
    assert pack_speech(data, Packing()) == data


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(1_000, 0.5), np.full(1_000, -0.25)], axis=1)
    assert set(heard(pack_speech(sound(stereo, 16_000), Packing()))[0]) == {4_096}  # 0.125 · 32768


def test_loud_sound_is_clipped_and_does_not_wrap() -> None:
    loud = sound(np.full(100, 1.5), 16_000, subtype="FLOAT")
    assert set(heard(pack_speech(loud, Packing()))[0]) == {32_767}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sound(tone(16_000), 16_000)[:-200], "unreadable recording: it is cut off"),
        (sound(tone(16_000), 16_000, "FLAC")[:-400], "unreadable recording"),
        (sound(np.zeros(0), 16_000), "empty recording"),
        (sound(np.full(2_000, np.nan), 16_000, subtype="FLOAT"), "unreadable recording: it holds values that are not numbers"),
        (sound(tone(8_000, 3.5), 8_000), "recording too long: it lasts 3.5 s; at most 3 s are packed"),
        (sound(tone(8_000, 0.05), 8_000), "recording too short: it lasts 0.05 s; at least 0.1 s are packed"),
        (b"", "unreadable recording"),
        (b"ftypM4A ", "unreadable recording"),
    ],
    ids=["cut wav", "cut flac", "no sound", "nan", "too long", "too short", "empty", "m4a"],
)
def test_recordings_that_cannot_be_used_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pack_speech(data, Packing(max_seconds=3.0, min_seconds=0.1))


def test_wav_files_written_to_a_pipe_are_read() -> None:
    data = bytearray(sound(tone(16_000), 16_000))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes them: sizes unknown
    assert len(heard(pack_speech(bytes(data), Packing()))[0]) == 16_000
