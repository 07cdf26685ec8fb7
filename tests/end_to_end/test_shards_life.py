"""The life of a data set, by the commands alone, in a folder and in a store: built, killed, looked after, cut up, merged, read."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from making_data import encoded
from PIL import Image
from typer.testing import CliRunner

from clipscale.data.shards import Sample, open_dataset
from data_tools.cli import app

ROOT = Path(__file__).parents[2]
ROWS, SPEAKERS = 60, 12
OPEN_CLIP = """
import sys, types, warnings
warnings.simplefilter("ignore")
import open_clip, torch.utils.data, webdataset
sys.modules["pandas"] = types.ModuleType("pandas")  # of which only its tables need something
from argparse import Namespace
from open_clip_train.data import get_dataset_size, get_wds_dataset
settings = dict(train_num_samples=None, val_num_samples=None, dataset_resampled=False, seed=0, workers=1, batch_size=7, world_size=1)
settings |= dict(train_data=sys.argv[1], val_data=sys.argv[1], train_data_upsampling_factors=None, use_audio=False)
data = get_wds_dataset(Namespace(**settings), lambda image: image.size, is_train=False, tokenizer=lambda text: [text])
print(*get_dataset_size(sys.argv[1]))
for _, texts in data.dataloader:
    print(*texts, sep="\\n")
"""
"""open_clip's own loader; what it says it holds, and the texts that it gives."""


def run(*arguments: object) -> str:
    """What a command says; it must end well."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return str(done.output)


def photo(number: int) -> bytes:
    """Noise that is like no other's, but for photograph 3, which is photograph 1."""
    noise = np.random.default_rng(1 if number == 3 else number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of photographs, of which number 5 is damaged."""
    for number in range(ROWS):
        (tmp_path / f"{number}.png").write_bytes(photo(number) if number != 5 else b"damaged")
    lines = [f"{number}.png,photograph {number},s{number % SPEAKERS}" for number in range(ROWS)]
    (tmp_path / "in.csv").write_text("\n".join(["file,caption,speaker", *lines]))
    return tmp_path / "in.csv"


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the data sets go: a folder, or a store that only this process sees."""
    if request.param == "folder":
        yield str(tmp_path)
        return
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://life"
    MemoryFileSystem.store.clear()


def begun_and_killed(arguments: list[object], output: Path) -> None:
    """Begin the command in a process of its own, and kill it once two shards stand."""
    process = subprocess.Popen([sys.executable, "-m", "data_tools", *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(output.glob("0*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()


def captions(url: str) -> list[str]:
    index = open_dataset(url)
    samples = [sample for shard in range(len(index.shards)) for sample in index.read(shard, range(int(index.samples[shard])))]
    assert all(isinstance(sample, Sample) for sample in samples)
    return sorted(sample.captions[0] for sample in samples if isinstance(sample, Sample))


def named(numbers: Iterator[int] | list[int]) -> list[str]:
    return sorted(f"photograph {number}" for number in numbers)


def tars_of(url: str, copy: Path) -> list[str]:
    """The tars of a data set, on this machine."""
    store, root = fsspec.core.url_to_fs(url)
    store.get(f"{root.rstrip('/')}/", f"{copy}/", recursive=True)
    return sorted(map(str, copy.glob("*.tar")))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tars it has read open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_data_set_lives_through_all_commands(place: str, table: Path, tmp_path: Path) -> None:
    photos = f"{place}/photos"
    build: list[object] = ["build", table, photos, "--samples-per-shard", 8, "--max-bad", 0.1, "--workers", 1]
    if "://" not in place:
        begun_and_killed(build, Path(photos))
    assert "59 samples in 8 shards" in run(*build)
    assert "59 samples in 8 shards (8 stood already)" in run(*build)
    run("verify", photos, "--workers", 1)
    assert "duplicates: 1 samples hold the same media" in run("describe", photos, "--page", tmp_path / "page.html")

    assert "1 of 59 samples repeat earlier ones" in run("dedupe", photos, "--keys", tmp_path / "repeats.txt", "--workers", 1)
    clean: list[object] = ["reshard", photos, "--without", tmp_path / "repeats.txt", "--into", f"{place}/clean", "--samples-per-shard", 20]
    assert "58 samples in 3 shards" in run(*clean, "--workers", 1)
    assert "58 samples in 3 shards (3 stood already)" in run(*clean, "--workers", 1)

    parts = ("--part", "train=0.7", "--part", "test=0.3", "--by", "speaker")
    run("split", f"{place}/clean", *parts, "--into", f"{place}/parts", "--workers", 1)
    train, test = (captions(f"{place}/parts/{part}") for part in ("train", "test"))
    assert {int(name.split()[1]) % SPEAKERS for name in train}.isdisjoint(int(name.split()[1]) % SPEAKERS for name in test)
    run("merge", f"{place}/parts/train", f"{place}/parts/test", "--into", f"{place}/merged", "--samples-per-shard", 25, "--workers", 1)
    kept = [number for number in range(ROWS) if number not in (3, 5)]
    assert captions(f"{place}/merged") == sorted(train + test) == named(kept)

    assert "0 of 1 rows became samples" in run("retry", photos, "--workers", 1)
    (table.parent / "5.png").write_bytes(photo(5))
    assert "1 of 1 rows became samples in 000008" in run("retry", photos, "--workers", 1)
    assert "nothing to try again" in run("retry", photos, "--workers", 1)
    for name in ("photos", "clean", "merged", "parts/train", "parts/test"):
        run("verify", f"{place}/{name}", "--workers", 1)
    names = {name.rpartition("/")[2] for name in fsspec.core.url_to_fs(place)[0].find(fsspec.core.url_to_fs(f"{place}/photos")[1])}
    shards = {f"00000{number}.{suffix}" for number in range(9) for suffix in ("tar", "parquet")}
    assert names == {*shards, "index.parquet", "index.sha256", "sizes.json", "build.json"}

    tars = tars_of(photos, tmp_path / "copy")
    read = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    assert sorted(sample["txt"].decode() for sample in read) == named(list(range(ROWS)))
    if "://" in place:
        return
    told = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, f"{place}/photos/{{000000..000008}}.tar"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    counts, *texts = told.stdout.splitlines()
    assert counts == "60 9"
    assert sorted(texts) == named(list(range(ROWS)))
