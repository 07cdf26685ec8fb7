"""Does a build that is killed at 100 random moments end in the bytes of one that nobody killed?

Each round starts the same command, on 1, 2 or 3 processes, and kills it with SIGKILL after a random share of the time that a whole
build takes; a build that ends before that is begun anew from nothing. Printed as JSON; the exit code is 1 when a byte differs or a
file is left over.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image


def main() -> None:
    """Kill, compare, print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--smoke", action="store_true", help="three kills, to see that it runs")
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measured = _measure(Path(place), 3 if given.smoke else given.kills, 60 if given.smoke else 300, random.Random(given.seed))
    print(json.dumps(measured, indent=1))
    sys.exit(measured["files that differ or are left over"] > 0)


def _measure(place: Path, kills: int, rows: int, dice: random.Random) -> dict[str, Any]:
    _input(place / "in", rows)
    started = time.monotonic()
    _run(_command(place / "in", place / "whole", 2))
    whole_s = time.monotonic() - started
    done, ends, moments, wrong = 0, 0, Counter[str](), set[str]()
    while done < kills:
        command = _command(place / "in", place / "out", dice.choice((1, 2, 3)))
        if _killed(command, dice.uniform(0.05, 1.0) * whole_s):
            done += 1
            moments[_moment(place / "out")] += 1
        else:
            ends += 1
            wrong |= _differences(place / "out", place / "whole")
            shutil.rmtree(place / "out")
    _run(_command(place / "in", place / "out", 2))
    wrong |= _differences(place / "out", place / "whole")
    return {
        "kills": kills,
        "killed while there was": dict(moments),
        "whole data sets compared": ends + 1,
        "files that differ or are left over": len(wrong),
        "which": sorted(wrong)[:10],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pyarrow")},
    }


def _input(folder: Path, rows: int) -> None:
    """Pictures that are shrunk, recordings that are resampled, and one of twenty that cannot be read."""
    folder.mkdir()
    lines = ["image,recording,caption"]
    for number in range(rows):
        noise = np.random.default_rng(number)
        stream = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(stream, "JPEG")
        (folder / f"{number}.jpg").write_bytes(stream.getvalue()[: -99 if number % 20 == 7 else None])
        soundfile.write(folder / f"{number}.wav", noise.normal(0, 0.1, 4_000), 8_000)
        lines.append(f"{number}.jpg,{number}.wav,row {number}")
    (folder / "in.csv").write_text("\n".join(lines))


def _command(source: Path, output: Path, workers: int) -> list[str]:
    options = ("--samples-per-shard", "25", "--max-side", "100", "--max-bad", "0.1", "--workers", str(workers))
    return [sys.executable, "-m", "data_tools", "build", str(source / "in.csv"), str(output), *options]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _killed(command: list[str], after_s: float) -> bool:
    """Whether the command was still at work when it was killed; its processes are gone afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _wait_for_session(process.pid)
        return True
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return False


def _wait_for_session(session: int, patience_s: float = 20.0) -> None:
    """Until the killed command's workers have noticed that their parent is gone."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if subprocess.run(["pgrep", "-s", str(session)], capture_output=True, check=False).returncode:
            return
        time.sleep(0.05)
    raise SystemExit(f"workers of the killed command {session} are still there after {patience_s:g} s")


def _moment(output: Path) -> str:
    if not (output / "build.json").exists():
        return "no plan yet"
    if (output / "index.parquet").exists():
        return "the index already"
    shards = len(list(output.glob("*.tar")))
    return "a plan and no shard" if not shards else "some shards"


def _differences(output: Path, expected: Path) -> set[str]:
    one, other = (
        {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
        for folder in (output, expected)
    )
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


if __name__ == "__main__":
    main()
