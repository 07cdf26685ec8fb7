"""How fast does clipscale-shards pack images, beside img2dataset and beside copying the files?

    python benchmarks/build_shards.py --peer PYTHON      PYTHON has img2dataset 1.47; without it that part is left out, and said so

Photographs of about 500 × 375 pixels, made here. img2dataset gets them from a server on loopback, a process whose time is not counted;
processor time is that of the whole command, and of a further image: a run of all images minus one of a quarter of them. Packing them as
they are, and the same with a shorter side of 256 as large sets have them, is measured without starting a command too, beside what a core
can do at all: a bare loop that reads, hashes and writes the same files, hashing each twice, since the format names the sha256 of samples
and of shards. Rounds are interleaved and the smallest is taken. Printed as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.build import build
from data_tools.packing import Packing
from data_tools.plan import write_plan
from data_tools.rows import open_rows

_DIFFERENT = 64  # photographs; the others are copies of them
_AS_THEY_ARE = Packing(samples_per_shard=1_000, check_images="header")
_SERVER = """
import http.server, sys
from functools import partial
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""
_PEER = """
import sys
from img2dataset import download
urls, output, mode, image_size = sys.argv[1:]
if __name__ == "__main__":
    download(url_list=urls, output_folder=output, image_size=int(image_size), resize_mode=mode, output_format="webdataset",
             input_format="txt", processes_count=1, thread_count=16, number_sample_per_shard=1000, encode_quality=95, compute_hash="sha256")
"""


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--smoke", action="store_true", help="a few images, to see that it runs")
    arguments.add_argument("--peer", help="a Python that has img2dataset")
    arguments.add_argument("--images", type=int, default=4_000)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    number, rounds = (40, 1) if given.smoke else (given.images, given.rounds)
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(_measure(Path(place), number, rounds, given.peer), indent=1))


def _measure(place: Path, number: int, rounds: int, peer: str | None) -> dict[str, Any]:
    bytes_of_all = _photographs(place / "all", number)
    _photographs(place / "quarter", number // 4)
    runs: dict[str, Callable[[Path], list[str]]] = {
        "resize": lambda folder: _build(folder, place / "out", "--resize", "shorter:256"),
        "pass-through": lambda folder: _build(folder, place / "out", "--check-images", "header"),
    }
    server = None
    if peer:
        server, port = _serve(place)
        for folder in ("all", "quarter"):
            names = sorted(path.name for path in (place / folder).glob("*.jpg"))
            (place / f"{folder}.txt").write_text("".join(f"http://127.0.0.1:{port}/{folder}/{name}\n" for name in names))
        (place / "peer.py").write_text(_PEER)
        runs["img2dataset resize"] = lambda folder: [
            peer, str(place / "peer.py"), f"{folder}.txt", str(place / "out"), "keep_ratio", "256",
        ]  # fmt: skip
    seconds = {name: {"all": [], "quarter": []} for name in runs}
    _smaller(place / "all", place / "small")
    alone = {folder: {"build": [], "plan": [], "bare loop": []} for folder in ("all", "small")}
    walls, copies = [], []
    try:
        for _ in range(rounds):
            for name, command in runs.items():
                for folder in ("all", "quarter"):
                    seconds[name][folder].append(_timed(command(place / folder), place / "out"))
            os.sync()
            walls.append(_wall_time(lambda: _pack(place / "all", place / "packed")))
            copies.append(_copy(place / "all", place / "copy"))
            for folder, times in alone.items():
                times["build"].append(_processor_time(lambda folder=folder: _pack(place / folder, place / "packed")))
                times["plan"].append(_processor_time(lambda folder=folder: _plan(place / folder, place / "plan")))
                times["bare loop"].append(_processor_time(lambda folder=folder: _bare(place / folder, place / "bare")))
    finally:
        if server:
            server.kill()
            server.wait()
    return _result(number, bytes_of_all, seconds, min(walls), min(copies), alone, peer)


def _result(
    number: int,
    bytes_of_all: int,
    seconds: dict[str, dict[str, list[float]]],
    wall: float,
    copy: float,
    alone: dict[str, dict[str, list[float]]],
    peer: str | None,
) -> dict[str, Any]:
    whole = {name: number / min(times["all"]) for name, times in seconds.items()}
    further = {name: (number - number // 4) / max(1e-9, min(times["all"]) - min(times["quarter"])) for name, times in seconds.items()}
    measured: dict[str, Any] = {
        "images": number,
        "megabytes": round(bytes_of_all / 1e6, 1),
        "images a second of processor time, whole command": {name: round(rate) for name, rate in whole.items()},
        "images a second of processor time, further images": {name: round(rate) for name, rate in further.items()},
        "pass-through without starting a command over copying, wall time rates": round(copy / wall, 3),
        "pass-through without starting a command": {folder: _alone(number, times) for folder, times in alone.items()},
    }
    if peer:
        measured["resize over img2dataset, whole command"] = round(whole["resize"] / whole["img2dataset resize"], 2)
        measured["resize over img2dataset, further images"] = round(further["resize"] / further["img2dataset resize"], 2)
    else:
        measured["img2dataset"] = "not measured: no --peer was given"
    packages = ("torch", "simplejpeg", "opencv-python-headless", "pillow", "pyarrow")
    return {**measured, "versions": {name: importlib.metadata.version(name) for name in packages}}


def _alone(number: int, times: dict[str, list[float]]) -> dict[str, float]:
    build, plan, bare = (min(times[name]) for name in ("build", "plan", "bare loop"))
    return {
        "images a second of processor time": round(number / build),
        "of its shard jobs, without the plan": round(number / (build - plan)),
        "of the bare loop": round(number / bare),
        "shard jobs over the bare loop": round(bare / (build - plan), 2),
    }


def _photographs(folder: Path, number: int) -> int:
    """Pictures with smooth parts and fine grain, as photographs have, each with a caption; their bytes."""
    folder.mkdir()
    total = 0
    for index in range(number):
        path = folder / f"{index:06d}.jpg"
        if index < _DIFFERENT:
            random = np.random.default_rng(index)
            size = [(500, 375), (375, 500), (500, 333), (640, 480)][index % 4]
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
            grain = random.normal(0, 12, (size[1], size[0], 1))
            pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, "JPEG", quality=92)
        else:
            shutil.copy(folder / f"{index % _DIFFERENT:06d}.jpg", path)
        path.with_suffix(".txt").write_text(f"picture {index}\n")
        total += path.stat().st_size
    return total


def _smaller(source: Path, target: Path) -> None:
    """The photographs with a shorter side of 256, as JPEG of quality 75: about 19 kB."""
    target.mkdir()
    for index, path in enumerate(sorted(source.glob("*.jpg"))):
        if index < _DIFFERENT:
            picture = Image.open(path)
            scale = 256 / min(picture.size)
            picture.resize((round(picture.width * scale), round(picture.height * scale))).save(target / path.name, quality=75)
        else:
            shutil.copy(target / f"{index % _DIFFERENT:06d}.jpg", target / path.name)
        shutil.copy(path.with_suffix(".txt"), target)


def _build(folder: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "data_tools",
        "build",
        str(folder),
        str(output),
        "--samples-per-shard",
        "1000",
        "--workers",
        "1",
        *options,
    ]


def _serve(folder: Path) -> tuple[subprocess.Popen[str], int]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    return server, int(server.stdout.readline())


def _timed(command: list[str], output: Path) -> float:
    """Processor time of a command that makes `output`."""
    shutil.rmtree(output, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or not list(output.glob("*.tar")):
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _processor_time(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _wall_time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _pack(folder: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    build(open_rows(folder), output, packing=_AS_THEY_ARE, workers=1)


def _plan(folder: Path, path: Path) -> None:
    write_plan(path, open_rows(folder).read(), _AS_THEY_ARE)


def _bare(folder: Path, target: Path) -> None:
    """The least that packing files as they are can be."""
    whole = hashlib.sha256()
    with target.open("wb", buffering=1 << 20) as output:
        for entry in os.scandir(folder):
            if entry.name.endswith(".jpg"):
                with Path(entry.path).open("rb", buffering=0) as file:
                    data = file.readall()
                hashlib.sha256(data).digest()
                whole.update(data)
                output.write(data)
        os.fsync(output.fileno())


def _copy(source: Path, target: Path) -> float:
    """Wall time of copying every file into another folder, as `cp -r` does, and having it on disk."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    return _wall_time(lambda: (shutil.copytree(source, target), os.sync()))


if __name__ == "__main__":
    main()
