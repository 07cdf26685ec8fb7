"""Dedupe: exact repeats, near pictures by an independent reckoning of all pairs, the same sound in two formats, contamination."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from making_data import encoded, recording, tone
from PIL import Image
from scipy.fft import dctn

from clipscale.data.shards import ShardWriter, write_index
from data_tools.dedupe import Repeat, Repeats, dedupe
from data_tools.fingerprints import picture_bits
from data_tools.near import near_pairs


def photograph(number: int, side: int = 96) -> Image.Image:
    """A smooth picture of its own: a few waves and a blot."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = sum(generator.normal() * np.cos(2 * np.pi * (generator.uniform(-3, 3) * x + generator.uniform(-3, 3) * y)) for _ in range(8))
    colours = np.stack([waves * generator.uniform(0.5, 1) for _ in range(3)], axis=2)
    return Image.fromarray(np.clip(128 + 40 * colours, 0, 255).astype(np.uint8))


def write(folder: Path, samples: dict[str, dict[str, bytes]], shard_size: int = 3) -> Path:
    folder.mkdir()
    names, shards = list(samples), []
    for begin in range(0, len(names), shard_size):
        with ShardWriter(folder, f"{begin // shard_size:06d}") as writer:
            for name in names[begin : begin + shard_size]:
                writer.write(name, captions=["a caption"], **samples[name])  # type: ignore[arg-type]
        shards.append(writer.info)
    write_index(folder, shards)
    return folder


def repeats(*datasets: Path, against: tuple[Path, ...] = (), distance: int = 4) -> tuple[dict[str, str], Repeats]:
    found: list[Repeat] = []
    result = dedupe([*map(str, datasets)], found=found.append, against=[*map(str, against)], distance=distance, workers=1)
    return {f"{repeat.place}-{repeat.key}": repeat.of_key for repeat in found}, result


@pytest.mark.parametrize("distance", [1, 3, 4, 8])
def test_all_near_pairs_are_found_and_no_others(distance: int) -> None:
    """Against all pairs, on hashes made to be near: random ones, and neighbours of them at every distance up to 10."""
    generator = np.random.default_rng(distance)
    centres = generator.integers(0, 2**64, 120, np.uint64)
    hashes = {int(centre) for centre in centres}
    for centre in centres.tolist():
        for bits in generator.integers(1, 11, 6).tolist():
            hashes.add(int(centre) ^ sum(1 << int(bit) for bit in generator.choice(64, bits, replace=False)))
    values = np.array(sorted(hashes), np.uint64)
    expected = [
        [i, j] for i in range(len(values)) for j in range(i + 1, len(values)) if (int(values[i]) ^ int(values[j])).bit_count() <= distance
    ]
    assert len(expected) > 50
    assert near_pairs(values, distance).tolist() == expected


def test_the_bits_of_a_picture_are_those_of_the_published_hash() -> None:
    """scipy's DCT in place of ours; a median has a bit on neither side, so bits are compared where it matters."""
    for number in range(5):
        picture = photograph(number)
        grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
        low = dctn(grey, norm="ortho")[:8, :8]
        expected = "".join("1" if value else "0" for value in (low > np.median(low)).reshape(-1))
        assert picture_bits(encoded(picture)) == int(expected, 2)
    assert picture_bits(encoded(Image.new("RGB", (50, 50), "red"))) is None


def test_pictures_made_anew_are_near_and_other_pictures_are_not(tmp_path: Path) -> None:
    originals = {f"p{number}": {"image": encoded(photograph(number))} for number in range(12)}
    changed = {
        "jpeg": {"image": encoded(photograph(1), "JPEG", quality=60)},
        "small": {"image": encoded(photograph(2).resize((48, 48), Image.Resampling.BICUBIC))},
        "webp": {"image": encoded(photograph(3), "WEBP", quality=70)},
        "bytes": originals["p4"],
        "brighter": {"image": encoded(photograph(5).point(lambda value: min(255, value + 6)))},
    }
    found, result = repeats(write(tmp_path / "set", {**originals, **changed}))
    assert found == {"0-jpeg": "p1", "0-small": "p2", "0-webp": "p3", "0-bytes": "p4", "0-brighter": "p5"}
    assert (result.samples, result.same, result.near, result.unreadable) == (17, 1, 4, 0)
    exact, _ = repeats(tmp_path / "set", distance=-1)
    assert exact == {"0-bytes": "p4"}


def test_flat_pictures_repeat_only_by_their_bytes(tmp_path: Path) -> None:
    red, blue = ({"image": encoded(Image.new("RGB", (40, 40), colour))} for colour in ("red", "blue"))
    assert repeats(write(tmp_path / "set", {"red": red, "blue": blue, "red2": red}))[0] == {"0-red2": "red"}


def test_the_same_sound_in_another_format_repeats(tmp_path: Path) -> None:
    wave = np.round(tone(0.3) * 32_767).astype(np.int16)
    samples = {
        "flac": {"speech": recording(wave)},
        "wav": {"speech": recording(wave, kind="WAV", subtype="PCM_16")},
        "other": {"speech": recording(np.roll(wave, 1))},
    }
    assert repeats(write(tmp_path / "set", samples))[0] == {"0-wav": "flac"}


def test_samples_of_a_picture_and_a_recording_repeat_when_both_do(tmp_path: Path) -> None:
    one, two = recording(tone(0.2)), recording(tone(0.2, hertz=600))
    picture, again = encoded(photograph(1)), encoded(photograph(1), "JPEG", quality=60)
    samples = {
        "a": {"image": picture, "speech": one},
        "b": {"image": again, "speech": two},
        "c": {"image": again, "speech": one},
        "d": {"image": picture},
    }
    assert repeats(write(tmp_path / "set", samples))[0] == {"0-c": "a"}


def test_what_an_evaluation_set_shares_with_training_data_is_named(tmp_path: Path) -> None:
    train = {f"t{number}": {"image": encoded(photograph(number))} for number in range(8)} | {"t0again": {"image": encoded(photograph(0))}}
    test = {
        "e0": {"image": encoded(photograph(3), "JPEG", quality=70)},
        "e1": {"image": encoded(photograph(6))},
        "e2": {"image": encoded(photograph(99))},
    }
    found, result = repeats(write(tmp_path / "train", train), against=(write(tmp_path / "test", test),))
    assert found == {"0-t3": "e0", "0-t6": "e1"}, "repeats inside the training data are not what was asked"
    assert (result.samples, result.same, result.near) == (9, 1, 1)
    across, _ = repeats(tmp_path / "test", tmp_path / "train")
    assert across == {"1-t3": "e0", "1-t6": "e1", "1-t0again": "t0"}


def test_damaged_samples_are_counted_and_do_not_stop_the_others(tmp_path: Path) -> None:
    damaged = bytearray(encoded(photograph(1)))
    damaged[200:260] = bytes(60)
    samples = {
        "a": {"image": bytes(damaged)},
        "b": {"image": encoded(photograph(2))},
        "c": {"image": encoded(photograph(2), "JPEG", quality=80)},
    }
    found, result = repeats(write(tmp_path / "set", samples))
    assert (found, result.unreadable) == ({"0-c": "b"}, 1)


def test_a_picture_that_lies_on_its_side_is_the_upright_one() -> None:
    picture, stream = photograph(7), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(stream, "JPEG", quality=95, exif=exif)
    one, other = picture_bits(stream.getvalue()), picture_bits(encoded(picture))
    assert one is not None
    assert other is not None
    assert (one ^ other).bit_count() <= 4
