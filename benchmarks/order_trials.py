"""Does any sample get lost, or come twice, when ranks are killed and come back as other ranks with other workers?

A trial trains nothing but reads as training does: every rank is a process around `resume_batches` that writes down what it saw. At
random moments all of them are killed with SIGKILL, and as many ranks and workers as chance says go on from the last checkpoint, over two
epochs and more of every source, with mixing by weights (in half of the trials weights that change) and length buckets. What the ranks
wrote down is then counted, and compared with what one process that nobody killed saw, row by row and bit by bit.

    python benchmarks/order_trials.py --trials 200
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import mmap
import os
import platform
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from clipscale.data.sample import Batch
from clipscale.data.shards import ShardWriter, write_index
from clipscale.data.sources.shards import Shards
from clipscale.data.stream import TrainingStream, resume_batches
from clipscale.inputs import ImageInput, SpeechInput, TextInput

RANKS, WORKERS = range(1, 9), range(9)
GLOBAL_BATCHES = (120, 168, 840)  # between them, and the last alone, multiples of every number of ranks
PATIENCE_S = 300.0

Row = tuple[int, int, int, str]
"""Source, number of the sample in it, key of its augmentation, hash of everything in the row."""


def spelled(captions: list[str]) -> dict[str, torch.Tensor]:
    """Captions as bytes, padded to the longest."""
    longest = max(len(caption) for caption in captions)
    tokens = torch.tensor([list(caption.encode().ljust(longest, b"\0")) for caption in captions]).long()
    return {"tokens": tokens, "mask": (tokens > 0).long()}


INPUTS: dict[Any, Any] = {"image": ImageInput(size=8), "speech": SpeechInput(max_seconds=0.2), "text": TextInput(spelled, 64)}


# --- data -------------------------------------------------------------------------------------------------------------


def write_source(folder: Path, source: int, rng: np.random.Generator) -> int:
    """Two to five shards of uneven sizes; pictures tell their source and number by their colour. How many samples."""
    shards, number = [], 0
    for shard in range(int(rng.integers(2, 6))):
        with ShardWriter(folder, f"{shard:06d}") as writer:
            for _ in range(int(rng.integers(1, 40))):
                picture, sound = io.BytesIO(), io.BytesIO()
                Image.new("RGB", (8, 8), (number % 256, number // 256, source)).save(picture, "PNG")
                soundfile.write(sound, rng.normal(0, 0.1, int(rng.lognormal(7, 0.5))), 16_000, format="FLAC")
                captions = [f"{'word ' * int(rng.integers(9))}{number}", f"number {number}"]
                writer.write(f"{source}_{number:05d}", captions=captions, image=picture.getvalue(), speech=sound.getvalue())
                number += 1
        shards.append(writer.info)
    write_index(folder, shards)
    return number


# --- a trial ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What chance chose."""

    sizes: list[int]
    sources: dict[str, Shards]
    settings: dict[str, Any]
    batches: int
    every: int
    """Batches between checkpoints."""

    def stream(self, saved: dict[str, Any] | None, *, rank: int, world: int, workers: int) -> TrainingStream:
        """As training opens it."""
        return resume_batches(saved, self.sources, rank=rank, world=world, workers=workers, **self.settings)


def draw_trial(folder: Path, rng: np.random.Generator) -> Trial:
    """Two or three new sources, and settings that give two epochs of each within at most 16 global batches."""
    sizes = []
    for source in range(int(rng.integers(2, 4))):
        place = folder / f"source{source}"
        place.mkdir(parents=True)
        sizes.append(write_source(place, source, rng))
    global_batch = int(rng.choice(GLOBAL_BATCHES, p=[0.5, 0.4, 0.1]))
    bucket_batches = int(rng.choice([2, 3, 4]))
    while True:
        weights = [size * float(rng.choice([0.5, 1.0, 1.5])) for size in sizes]
        later: list[dict[int, float]] = [{} for _ in sizes]
        if rng.random() < 0.5:
            later[0] = {int(rng.integers(1, 6)): weights[0] * float(rng.choice([0.25, 2.0]))}
        for batches in range(bucket_batches, 17, bucket_batches):
            shares = expected_rows(weights, later[0], batches * global_batch, global_batch)
            if all(share >= 2 * size + 1 for share, size in zip(shares, sizes, strict=True)):
                break
        else:
            continue
        break
    names = [f"source{source}" for source in range(len(sizes))]
    return Trial(
        sizes=sizes,
        sources={
            name: Shards(url=str(folder / name), weight=weight, later_weights=changed)
            for name, weight, changed in zip(names, weights, later, strict=True)
        },
        settings={
            "kind": "pairs",
            "modalities": ("speech" if rng.random() < 0.25 else "image", "text"),
            "inputs": INPUTS,
            "global_batch": global_batch,
            "seed": int(rng.integers(1000)),
            "lanes": [None, 1, 8, 24][int(rng.integers(4))],
            "bucket_batches": bucket_batches,
            "allow_change": False,
        },
        batches=batches,
        every=int(rng.integers(1, 4)),
    )


def expected_rows(weights: list[float], later: dict[int, float], rows: int, global_batch: int) -> list[float]:
    """Rows each source should have had, not rounded; the first one's weight changes at most once."""
    change, changed = next(((batch * global_batch, weight) for batch, weight in later.items()), (rows, weights[0]))
    first, rest = min(rows, change), max(rows - change, 0)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) * first for weight in weights]
    now = [changed, *weights[1:]]
    return [float(share + Fraction(weight) / sum(map(Fraction, now)) * rest) for share, weight in zip(shares, now, strict=True)]


def rows_of(batch: Batch) -> list[Row]:
    """A batch row by row; recordings and captions without the padding that their neighbours need."""
    rows = []
    for row, key in enumerate(batch.keys):
        source, number = map(int, key.split("_"))
        if "image" in batch.inputs:  # what was decoded, not what it is called
            red, green, blue = batch.inputs["image"]["pixels"][row, :, 0, 0].tolist()
            source, number = blue, red + 256 * green
        parts = [repr((key, batch.captions[row], int(batch.caption_ids[row]), int(batch.seeds[row]), bool(batch.valid[row]))).encode()]
        for tensors in batch.inputs.values():
            size = int(tensors["length"][row]) if "length" in tensors else int(tensors["mask"][row].sum()) if "mask" in tensors else None
            parts += [(tensor[row] if tensor.ndim == 1 else tensor[row][:size]).numpy().tobytes() for tensor in tensors.values()]
        rows.append((source, number, int(batch.seeds[row]), hashlib.sha256(b"|".join(parts)).hexdigest()[:24]))
    return rows


# --- ranks ------------------------------------------------------------------------------------------------------------


class Ranks:
    """Consumers of one launch, each a process group of its own; `done[rank]` is how many batches a rank has written down."""

    def __init__(self, trial: Trial, folder: Path, *, world: int, workers: list[int]) -> None:
        self.trial, self.folder, self.world = trial, folder, world
        self.done = mmap.mmap(-1, 8 * world)
        state = folder / "state.json"
        self.saved = json.loads(state.read_text()) if state.exists() else None
        self.first = self.saved["batches"] if self.saved else 0
        self.launch = len(list(folder.glob("launch*")))
        (folder / f"launch{self.launch}").mkdir()
        self.processes = [self._start(rank, workers[rank]) for rank in range(world)]

    def _start(self, rank: int, workers: int) -> int:
        struct.pack_into("q", self.done, 8 * rank, self.first)
        process = os.fork()
        if process:
            return process
        os.setpgid(0, 0)
        try:
            self._consume(rank, workers)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _consume(self, rank: int, workers: int) -> None:
        """What a rank does: take a batch, write down what it held; behind every n-th one rank 0 writes where the run stands."""
        stream = self.trial.stream(self.saved, rank=rank, world=self.world, workers=workers)
        log = os.open(self.folder / f"launch{self.launch}" / f"rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in range(self.first, self.trial.batches):
            os.write(log, json.dumps([number, rows_of(next(stream))]).encode() + b"\n")
            struct.pack_into("q", self.done, 8 * rank, number + 1)
            if (number + 1) % self.trial.every == 0 or number + 1 == self.trial.batches:
                while self.slowest() < number + 1:  # all ranks write a checkpoint together
                    time.sleep(0.001)
                if rank == 0:
                    aside = self.folder / "state.partial"
                    aside.write_text(json.dumps(stream.state()))
                    aside.replace(self.folder / "state.json")

    def slowest(self) -> int:
        """Batches that every rank has written down."""
        return min(struct.unpack_from("q", self.done, 8 * rank)[0] for rank in range(self.world))

    def kill_when(self, batches: int, *, delay_s: float) -> None:
        """SIGKILL for all, some time after so many batches; or their end, when they get there first."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = set(self.processes)
        while waiting and self.slowest() < batches:
            assert time.monotonic() < deadline, "ranks stand still"
            waiting -= {process for process in list(waiting) if self._ended(process)}
            time.sleep(0.002)
        time.sleep(delay_s)
        for process in self.processes:
            if process in waiting:
                _kill_group(process)
        for process in waiting:
            os.waitpid(process, 0)

    def _ended(self, process: int) -> bool:
        ended, status = os.waitpid(process, os.WNOHANG)
        assert not ended or os.waitstatus_to_exitcode(status) == 0, "a rank failed"
        return bool(ended)

    def saw(self) -> list[dict[int, list[Row]]]:
        """What each rank wrote down whole, by batch."""
        logs = []
        for rank in range(self.world):
            path = self.folder / f"launch{self.launch}" / f"rank{rank}"
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last one was cut, or is empty
            logs.append({number: [tuple(row) for row in rows] for number, rows in map(json.loads, lines)})
        return logs


def _kill_group(process: int) -> None:
    """SIGKILL for a rank and its workers; a rank that has not come so far as to have a group is killed alone."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(process, signal.SIGKILL)


# --- the count --------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """Over all trials."""

    trials: int = 0
    kills: int = 0
    rows: int = 0
    lost: int = 0
    repeated: int = 0
    differing: int = 0
    """Batches of a rank that were not its part of the uninterrupted run's batch."""
    strayed: int = 0
    """Sources whose share of the rows was not that of their weight."""
    largest_state_bytes: int = 0
    ranks: Counter[int] | None = None
    workers: Counter[int] | None = None


def run_trial(folder: Path, rng: np.random.Generator, count: Count) -> None:
    """One trial, added to the count."""
    trial = draw_trial(folder, rng)
    wanted = [rows_of(batch) for batch in islice(trial.stream(None, rank=0, world=1, workers=0), trial.batches)]
    kept: dict[int, list[Row]] = {}
    kills, launch = int(rng.integers(1, 5)), None
    while len(kept) < trial.batches:
        world = int(rng.choice([ranks for ranks in RANKS if trial.settings["global_batch"] % ranks == 0]))
        workers = rng.choice(WORKERS, size=world).tolist()
        workers = [number if rank == 0 else number % 3 for rank, number in enumerate(workers)]  # 64 processes are no better trial than 16
        launch = Ranks(trial, folder, world=world, workers=workers)
        last = trial.batches + 1 if kills == 0 else int(rng.integers(launch.first, trial.batches + 1))
        launch.kill_when(last, delay_s=float(rng.random()) * 0.03)
        count.kills += kills > 0
        kills = max(0, kills - 1)
        assert count.ranks is not None
        assert count.workers is not None
        count.ranks[world] += 1
        count.workers.update(workers)
        add(launch, wanted, kept, count)
    judge(trial, kept, count)


def add(launch: Ranks, wanted: list[list[Row]], kept: dict[int, list[Row]], count: Count) -> None:
    """Compare everything a launch's ranks saw, and keep what lies before its last checkpoint."""
    state = launch.folder / "state.json"
    saved = json.loads(state.read_text())["batches"] if state.exists() else 0
    if state.exists():
        count.largest_state_bytes = max(count.largest_state_bytes, state.stat().st_size)
    logs = launch.saw()
    size = len(wanted[0]) // launch.world
    for rank, log in enumerate(logs):
        count.differing += sum(rows != wanted[number][rank * size : (rank + 1) * size] for number, rows in log.items())
    for number in range(launch.first, saved):
        kept[number] = [row for log in logs for row in log[number]]


def judge(trial: Trial, kept: dict[int, list[Row]], count: Count) -> None:
    """Lost and repeated samples, counted from what the ranks saw alone."""
    rows = [row for number in range(trial.batches) for row in kept[number]]
    count.trials += 1
    count.rows += len(rows)
    weights = [source.weight for source in trial.sources.values()]
    size = trial.settings["global_batch"]
    shares = expected_rows(weights, next(iter(trial.sources.values())).later_weights, len(rows), size)
    for source, samples in enumerate(trial.sizes):
        seen = Counter(number for of, number, _, _ in rows if of == source)
        epochs, over = divmod(sum(seen.values()), samples)
        assert epochs >= 2, "a trial goes through every source twice"
        count.lost += sum(max(0, epochs - seen[number]) for number in range(samples))
        count.repeated += sum(max(0, seen[number] - epochs - (over > 0)) for number in seen)
        count.strayed += abs(sum(seen.values()) - shares[source]) > 2 * len(trial.sizes)
    augmented = Counter((source, number, key) for source, number, key, _ in rows)
    count.repeated += sum(times - 1 for times in augmented.values())  # the same sample in the same epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial; each number is a trial of its own")
    parser.add_argument("--smoke", action="store_true", help="one trial")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*multi-threaded|.*worker processes")
    torch.set_num_threads(1)
    count = Count(ranks=Counter(), workers=Counter())
    for number in range(options.first, options.first + (1 if options.smoke else options.trials)):
        with tempfile.TemporaryDirectory() as folder:
            run_trial(Path(folder), np.random.default_rng(number), count)
        if sys.stderr.isatty():
            print(f"trial {number}: {count}", file=sys.stderr)
    found = {name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in vars(count).items()}
    print(json.dumps({**found, "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}}))
    sys.exit(1 if count.lost or count.repeated or count.differing or count.strayed else 0)


if __name__ == "__main__":
    main()
