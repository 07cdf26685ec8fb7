"""How many images a core reads, decodes, resizes and batches, beside open_clip's pipeline and beside Pillow.

    python benchmarks/decode.py            1,000 photographs of 256 pixels and 200 of 1,024
    python benchmarks/decode.py --smoke    a few of each

Photographs: crops of scikit-learn's two, quality 95 at 256 pixels; at 1,024 mosaics of nine, quality 85. All become 224 pixels. open_clip's
pipeline is the stages of its loader with its own training transform (Pillow), through webdataset, from the same tar and without texts. Ours
reads by offset and ends with uint8 pixels; its augmentation and normalisation run on the device, and are timed here on the CPU as well.
Process CPU time on one thread, interleaved rounds, the smallest.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset
from open_clip import image_transform
from PIL import Image
from sklearn.datasets import load_sample_image

from clipscale.data.images import ImageAugment, decode_image, prepare_images
from clipscale.data.reader import Decoded, Reader, collate
from clipscale.data.shards import ShardWriter, open_dataset, write_index
from clipscale.inputs import ImageInput

SPEC = ImageInput(size=224)
BATCH = 100


def photographs(side: int, count: int, *, tiles: int, quality: int) -> list[bytes]:
    """JPEG files of mosaics of tiles × tiles random crops."""
    sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    draws, files, size = np.random.default_rng(0), [], -(-side // tiles)
    for _ in range(count):
        picture = np.empty((size * tiles, size * tiles, 3), dtype=np.uint8)
        for tile in range(tiles * tiles):
            source = sources[int(draws.integers(len(sources)))]
            top, left = (int(draws.integers(length - size)) for length in source.shape[:2])
            down, across = divmod(tile, tiles)
            picture[down * size :, across * size :][:size, :size] = source[top : top + size, left : left + size]
        file = io.BytesIO()
        Image.fromarray(picture[:side, :side]).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def write(folder: Path, files: list[bytes]) -> None:
    with ShardWriter(folder, "000000") as writer:
        for number, data in enumerate(files):
            writer.write(f"{number:06d}", captions=["a photograph"], image=data)
    write_index(folder, [writer.info])


def open_clip_pipeline(folder: Path, batch: int) -> None:
    """The stages of open_clip_train.data.get_wds_dataset."""
    stages = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(folder / "000000.tar")]),
        webdataset.tarfile_to_samples(),
        webdataset.select(lambda sample: "txt" in sample and "jpg" in sample),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=image_transform(SPEC.size, is_train=True)),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch, partial=False),
    )
    for _ in stages:
        pass


def ours(folder: Path, batch: int, *, prepared: bool = False) -> None:
    source = open_dataset(folder)
    reader, samples = Reader(source, {"image": SPEC}, cache=False), int(source.samples[0])
    for first in range(0, samples, batch):
        read = reader.read([(0, row) for row in range(first, first + batch)])
        decoded = [sample for sample in read if isinstance(sample, Decoded)]
        assert len(decoded) == batch
        pixels = collate(decoded, [""] * batch, {"image": SPEC})["image"]["pixels"]
        if prepared:
            prepare_images(pixels, SPEC, ImageAugment(), torch.arange(first, first + batch))


def with_pillow(files: list[bytes]) -> None:
    """What decode_image does, by Pillow alone."""
    for data in files:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        torch.from_numpy(np.array(picture.resize((SPEC.size, SPEC.size), Image.Resampling.BICUBIC))).permute(2, 0, 1).contiguous()


def with_ours(files: list[bytes]) -> None:
    for data in files:
        decode_image(data, SPEC)


def smallest(ways: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, float]:
    """CPU seconds of each way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            begun = time.process_time()
            run()
            taken[name].append(time.process_time() - begun)
    return {name: min(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few photographs")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    small = photographs(256, 20 if smoke else 1_000, tiles=1, quality=95)
    large = photographs(1024, 4 if smoke else 200, tiles=3, quality=85)
    batch, rounds = (10, 1) if smoke else (BATCH, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, small)
        ways: dict[str, Callable[[], None]] = {
            "open_clip": lambda: open_clip_pipeline(folder, batch),
            "ours": lambda: ours(folder, batch),
            "ours, augmented and normalised": lambda: ours(folder, batch, prepared=True),
            "Pillow, 1,024 pixels": lambda: with_pillow(large),
            "ours, 1,024 pixels": lambda: with_ours(large),
            "Pillow, 256 pixels": lambda: with_pillow(small),
            "ours, 256 pixels, decoded only": lambda: with_ours(small),
        }
        seconds = smallest(ways, rounds=rounds)
    measured = {
        "256 pixels: ours over open_clip": round(seconds["open_clip"] / seconds["ours"], 2),
        "256 pixels, augmented and normalised on the CPU too: ours over open_clip": round(
            seconds["open_clip"] / seconds["ours, augmented and normalised"], 2
        ),
        "256 pixels: ours over Pillow": round(seconds["Pillow, 256 pixels"] / seconds["ours, 256 pixels, decoded only"], 2),
        "1,024 pixels: ours over Pillow": round(seconds["Pillow, 1,024 pixels"] / seconds["ours, 1,024 pixels"], 2),
        "bytes": {"256 pixels": sum(map(len, small)) // len(small), "1,024 pixels": sum(map(len, large)) // len(large)},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "webdataset", "pillow", "simplejpeg")},
        },
    }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
