"""clipscale-shards on tars that other programs made: from the command to samples read back."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from making_data import encoded
from PIL import Image

from clipscale.data.shards import Sample, open_dataset

ROOT = Path(__file__).parents[2]


def run(*arguments: object, code: int = 0) -> str:
    """Everything the command printed; it must end with this exit code, and never with a traceback."""
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    return output


def jpeg(number: int) -> bytes:
    return encoded(Image.new("RGB", (16, 12), (number, 0, 255 - number)), "JPEG")


def fields(number: int) -> dict[str, object]:
    return {"caption": f"picture {number}", "url": f"https://x.org/{number}.jpg", "key": f"{number:09d}", "status": "success", "width": 16}


def img2dataset_tars(folder: Path, tars: int, samples: int) -> Path:
    """As img2dataset writes them, with its statistics beside."""
    folder.mkdir()
    for tar in range(tars):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as file:
            for number in range(tar * samples, (tar + 1) * samples):
                texts = {"txt": f"picture {number}".encode(), "json": json.dumps(fields(number)).encode()}
                for suffix, data in {"jpg": jpeg(number), **texts}.items():
                    header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    header.size = len(data)
                    file.addfile(header, io.BytesIO(data))
        (folder / f"{tar:05d}_stats.json").write_text(json.dumps({"successes": samples}))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "build.json"}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return img2dataset_tars(tmp_path_factory.mktemp("made") / "tars", 4, 10)


def test_img2dataset_tars_are_read_back_whole_and_alike_from_a_folder_or_a_pattern(tars: Path, tmp_path: Path) -> None:
    output = run("build", tars, tmp_path / "one", "--samples-per-shard", 16, "--workers", 1)
    assert "read as tars" in output
    assert "40 samples in 3 shards" in output
    run("build", tars / "{00000..00003}.tar", tmp_path / "two", "--samples-per-shard", 16, "--workers", 2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    index = open_dataset(tmp_path / "one")
    samples = [sample for shard, size in enumerate((16, 16, 8)) for sample in index.read(shard, range(size))]
    assert [(s.image, s.captions) for s in samples if isinstance(s, Sample)] == [(jpeg(n), [f"picture {n}"]) for n in range(40)]
    assert all(isinstance(s, Sample) and fields(n).items() <= s.record.items() for n, s in enumerate(samples))


def test_a_dry_run_shows_where_in_which_tar_a_row_lies(tars: Path, tmp_path: Path) -> None:
    output = run("build", tars / "00001.tar", tmp_path / "out", "--dry-run")
    assert "images and recordings: 10 and 0 in 00001.tar" in output
    assert re.search(rf"  image: 000000010\.jpg in {tars / '00001.tar'} as jpg of 16×12 pixels, \d+ B\n  caption: picture 10\n", output)
    assert not (tmp_path / "out").exists()


def test_a_cut_off_tar_ends_with_2_and_writes_nothing_or_is_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = img2dataset_tars(tmp_path / "tars", 2, 10)
    with tarfile.open(folder / "00001.tar") as tar:
        end = next(info.offset for info in tar if info.name == "000000014.txt")
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:end])
    assert f"00001.tar: it is cut off: it ends at byte {end:,}" in run("build", folder, tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
    output = run("build", folder, tmp_path / "out", "--damaged-tars", "keep", "--max-bad", 0.1)
    assert "14 samples in 1 shards" in output
    assert "left out: damaged tar 1" in output
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["row"] == "00001.tar:000000014"


def test_an_address_that_would_run_a_program_ends_with_2_and_runs_nothing(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert "only tars on a disk of this machine" in run("build", f"pipe:touch {gone}; cat x.tar", tmp_path / "out", code=2)
    assert not list(tmp_path.iterdir())
