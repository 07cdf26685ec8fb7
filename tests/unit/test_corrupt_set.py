"""The corrupt set: what is wrong with samples found on the web, in tars of others, is named; the rest is never paired wrongly."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_server import BOMB
from making_data import encoded, recording, tone
from PIL import Image

from clipscale.data.opening import open_dataset
from clipscale.data.reader import Decoded, Reader
from clipscale.data.sample import BadSample
from clipscale.inputs import ImageInput, SpeechInput
from data_tools.index import index

SIZE = 16
IMAGE, SPEECH = ImageInput(size=SIZE), SpeechInput(max_seconds=2.0)
Members = list[tuple[str, bytes]]


def colour(number: int) -> tuple[int, int, int]:
    """Of sample `number`; neighbours differ by 8 levels."""
    return 40 + 8 * number, 255 - 8 * number, 128


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.new("RGB", size, colour(number)).convert(mode)


def jpeg(number: int, mode: str = "RGB", **options: object) -> bytes:
    return encoded(picture(number, mode), "JPEG", quality=100, subsampling=0, **options)


def exif(orientation: int) -> bytes:
    about = Image.Exif()
    about[0x0112] = orientation
    return about.tobytes()


def textured() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", quality=95)


def grey16(number: int) -> bytes:
    return encoded(Image.fromarray(np.full((SIZE, SIZE), (40 + 8 * number) * 256 + 17, dtype=np.uint16)))


GOOD: dict[int, bytes] = {
    0: jpeg(0),
    1: jpeg(1, "CMYK"),
    2: encoded(picture(2, "RGBA")),
    3: encoded(picture(3), "WEBP", save_all=True, append_images=[picture(20)], lossless=True),
    4: encoded(picture(4), save_all=True, append_images=[picture(20)]),
    5: jpeg(5, exif=exif(6)),
    6: grey16(6),
}
"""Odd, and readable: plain, CMYK, RGBA, animated WebP and PNG, lying on its side, 16 bits."""

BAD: dict[str, tuple[bytes, bytes, str]] = {
    "cut": (textured()[:-900], b"cut", "damaged"),
    "flipped": (textured()[:1_500] + b"\xff\xc4\x00\x00" + textured()[1_504:], b"flipped", "damaged"),
    "png_cut": (encoded(Image.effect_noise((64, 64), 90))[:-300], b"png_cut", "damaged"),
    "webp_cut": (encoded(Image.effect_noise((64, 64), 90), "WEBP")[:-300], b"webp_cut", "damaged"),
    "gif": (encoded(picture(9), "GIF"), b"gif", "not a jpg, png or webp"),
    "html": (b"<html><body>403</body></html>", b"html", "not a jpg, png or webp"),
    "bomb": (BOMB, b"bomb", "pixels"),
    "wide": (encoded(Image.new("1", (20_000, 2))), b"wide", "pixels"),
    "latin": (jpeg(9), "caf\u00e9".encode("latin-1"), "not UTF-8"),
    "nul": (jpeg(9), b"\0\0\0", "caption"),
    "blank": (jpeg(9), b" \n\t", "caption"),
    "empty": (b"", b"empty", "empty member"),
}
"""Image, caption, and what must be said of it."""


def image_members() -> Members:
    good = [m for n, data in GOOD.items() for m in ((f"good{n}.jpg", data), (f"good{n}.txt", b"sample %d" % n))]
    bad = [m for key, (data, text, _) in BAD.items() for m in ((f"{key}.jpg", data), (f"{key}.txt", text))]
    nul_inside = [("good7.jpg", jpeg(7)), ("good7.txt", b"sam\0ple\x01 7")]
    pairs = [("twice.jpg", jpeg(21)), ("twice.txt", b"a"), ("twice.jpg", jpeg(22)), ("twice.txt", b"b")]
    dots = [("a.b.jpg", jpeg(23)), ("a.b.txt", b"a b"), ("alone.jpg", jpeg(24)), ("text.txt", b"text")]
    return [*good[:6], *bad, *pairs, *good[6:], *dots, *nul_inside]


STRUCTURE = {"twice": "duplicate key", "a.b": "key with a dot", "alone": "missing partner", "text": "missing partner"}


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def left_out(folder: Path) -> dict[str, str]:
    failures = map(json.loads, (folder / "failures.jsonl").read_text().splitlines())
    return {failure["row"].partition(":")[2]: f"{failure['reason']}: {failure['detail']}" for failure in failures}


def read_all(folder: Path, inputs: dict[str, object]) -> tuple[dict[str, Decoded], dict[str, str]]:
    """What a run gets of a data set, and what it says of the rest."""
    opened = open_dataset(folder)
    reader = Reader(opened, inputs, cache=False)  # type: ignore[arg-type]
    places = [(shard, row) for shard, size in enumerate(opened.samples) for row in range(size)]
    found = reader.read(places)
    bad = {opened.key(*place): sample for place, sample in zip(places, found, strict=True) if isinstance(sample, BadSample)}
    assert all(sample.source == str(folder) and sample.reason for sample in bad.values())
    return {sample.key: sample for sample in found if isinstance(sample, Decoded)}, {key: sample.reason for key, sample in bad.items()}


def test_images_that_can_be_read_are_with_their_captions_and_the_others_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", image_members())
    index(str(tmp_path), max_bad=0.9, workers=1)
    good, bad = read_all(tmp_path, {"image": IMAGE})
    named = left_out(tmp_path) | bad
    assert named.keys() == {*BAD, *STRUCTURE}
    assert {key: words for key, (_, _, words) in BAD.items() if words not in named[key]} == {}
    assert {key: words for key, words in STRUCTURE.items() if words not in named[key]} == {}
    assert sorted(good) == [f"good{number}" for number in range(8)]
    for number in range(8):
        (caption,) = good[f"good{number}"].captions
        assert caption == (f"sample {number}" if number < 7 else "sam ple 7")
        wanted = torch.tensor(colour(number) if number != 6 else (40 + 8 * 6,) * 3).view(3, 1, 1)
        image = good[f"good{number}"].image
        assert image is not None
        assert (image.int() - wanted).abs().max() <= 3  # JPEG's rounding; neighbours differ by 8


def hour_that_is_not_there() -> bytes:
    """A WAV whose header promises an hour."""
    data = bytearray(recording(tone(0.5), kind="WAV"))
    data[4:8], data[40:44] = struct.pack("<I", 36 + 3_600 * 32_000), struct.pack("<I", 3_600 * 32_000)
    return bytes(data)


def test_recordings_that_can_be_read_are_with_their_captions_and_the_others_are_named(tmp_path: Path) -> None:
    hour = recording(np.zeros(3_600 * 16_000, dtype=np.int16))
    files = {
        "good0": recording(tone(0.5, hertz=300)),
        "good1": recording(np.stack([tone(0.5, hertz=600, rate=48_000)] * 2, 1), 48_000, kind="WAV"),
        "hour": hour,
        "promised": hour_that_is_not_there(),
        "zero": recording(np.zeros(0), kind="WAV"),
        "cut": recording(np.random.default_rng(0).uniform(-0.5, 0.5, 16_000))[:9_000],
        "mp3": b"ID3" + bytes(400),
        "nan": recording(np.full(800, np.nan), kind="WAV", subtype="FLOAT"),
    }
    write_tar(tmp_path / "a.tar", [m for key, data in files.items() for m in ((f"{key}.flac", data), (f"{key}.txt", key.encode()))])
    index(str(tmp_path), max_bad=0.9, workers=1)
    good, bad = read_all(tmp_path, {"speech": SPEECH})
    named = left_out(tmp_path) | bad
    wanted = {"zero": "no frames", "cut": "damaged", "mp3": "not a flac or wav", "nan": "not finite"}
    assert {key: words for key, words in wanted.items() if words not in named.get(key, "")} == {}
    assert {key: sample.captions for key, sample in good.items()} == {key: [key] for key in files.keys() - named.keys()}
    assert {"good0", "good1", "hour"} <= good.keys()
    for key, hertz in (("good0", 300), ("good1", 600)):
        wave = np.asarray(good[key].speech, dtype=np.float64)
        assert abs(np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave) - hertz) <= 4
    assert good["hour"].speech is not None
    assert len(good["hour"].speech) == 32_000


@pytest.mark.parametrize("cut", ["inside a member", "between members", "between samples"])
def test_a_tar_cut_after_it_was_indexed_costs_only_what_is_lost(cut: str, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    path = write_tar(folder / "a.tar", [m for n in range(9) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.txt", b"sample %d" % n))])
    index(str(folder), workers=1)
    opened = open_dataset(folder)
    with tarfile.open(path) as tar:
        image, text = tar.getmembers()[10:12]
    end = {"inside a member": image.offset_data + 40, "between members": text.offset, "between samples": image.offset}[cut]
    path.write_bytes(path.read_bytes()[:end])
    found = Reader(opened, {"image": IMAGE}, cache=False).read([(0, row) for row in range(9)])
    for number, sample in enumerate(found):
        if number < 5:
            assert isinstance(sample, Decoded)
            assert sample.captions == [f"sample {number}"]
            assert sample.image is not None
            assert (sample.image.int() - torch.tensor(colour(number)).view(3, 1, 1)).abs().max() <= 3
        else:
            assert isinstance(sample, BadSample)
            assert f"the file ends inside sample '{number}'" in sample.reason


MEMORY = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_corrupt_set import IMAGE, SPEECH, read_all
from data_tools.index import index
def peak():  # not ru_maxrss, which a process takes over from whoever started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
for kind, spec in (("images", IMAGE), ("recordings", SPEECH)):
    for folder in (Path(sys.argv[1]), Path(sys.argv[2])):
        index(str(folder / kind), max_bad=0.99, workers=1)
        read_all(folder / kind, {"image" if kind == "images" else "speech": spec})
        print(kind, peak())
"""


def test_the_corrupt_set_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    """Peaks of a fresh process: good samples first, then the corrupt ones; 300 MB more would be allowed for a pipeline."""
    sets: dict[str, dict[str, Members]] = {
        "normal": {
            "images": [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", textured()), ("txt", b"normal"))],
            "recordings": [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("flac", recording(tone(2.0))), ("txt", b"normal"))],
        },
        "corrupt": {
            "images": image_members(),
            "recordings": [
                ("hour.flac", recording(np.zeros(3_600 * 16_000, dtype=np.int16))),
                ("hour.txt", b"hour"),
                ("promised.wav", hour_that_is_not_there()),
                ("promised.txt", b"promised"),
            ],
        },
    }
    for name, kinds in sets.items():
        for kind, members in kinds.items():
            (tmp_path / name / kind).mkdir(parents=True)
            write_tar(tmp_path / name / kind / "a.tar", members)
    arguments = [str(tmp_path / "normal"), str(tmp_path / "corrupt"), str(Path(__file__).parent)]
    environment_path = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {environment_path!r})\n{MEMORY}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert max(peaks) - peaks[0] <= 300, done.stdout
