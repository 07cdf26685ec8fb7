"""How long a run over a billion samples takes to know its first batch, in how much memory; and what length buckets leave of padding.

    python benchmarks/order.py            a billion samples in 100,000 shards, global batches of 4,096
    python benchmarks/order.py --smoke    a thousandth of it

Each start is a fresh process: CPU time from building the order to the rows of a batch in the middle of an epoch, and the growth of its
resident set; the smallest of three. Padding is over the whole global batch, recordings of 1 to 30 s with log-normal lengths.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version

import numpy as np

from clipscale.data.order import Order

BUCKETS = (1, 32, 64)
START = """
import sys, time
import numpy as np
from clipscale.data.order import Order
shards, bucket_batches, rank, world = map(int, sys.argv[1:])
def peak():  # this program's own: ru_maxrss begins at its parent's
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
before = peak()
begun = time.process_time()
sizes = {"photos": np.full(shards * 7 // 10, 10_000), "speech": np.full(shards * 3 // 10, 10_000)}
order = Order(sizes, {"photos": 0.7, "speech": 0.3}, seed=0, global_batch=4096, bucket_batches=bucket_batches,
    lengths=lambda source, shard, place: (place * 7919 + shard) % 30_000)
order.batch(shards * 10_000 // 4096 // 3, rank=rank, world=world)
print(time.process_time() - begun, (peak() - before) / 1e3)
"""


def start(shards: int, bucket_batches: int, *, rounds: int) -> tuple[float, float]:
    """CPU seconds and megabytes; the smallest of some rounds."""
    command = [sys.executable, "-c", START, str(shards), str(bucket_batches), "0", "8"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(rounds)]
    return min(float(run[0]) for run in runs), min(float(run[1]) for run in runs)


def padding(bucket_batches: int, *, median: float, batches: int) -> float:
    """Share of padding of 2,048 recordings a batch."""
    seconds = np.clip(np.random.default_rng(0).lognormal(np.log(median), 0.7, size=300_000), 1, 30)
    order = Order(
        {"speech": np.full(150, 2000)},
        {"speech": 1},
        seed=0,
        global_batch=2048,
        bucket_batches=bucket_batches,
        lengths=lambda _source, shard, place: seconds[shard * 2000 + place],
    )
    drawn = [seconds[order.batch(number).sample] for number in range(batches)]
    return float(1 - sum(batch.sum() for batch in drawn) / sum(len(batch) * batch.max() for batch in drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a thousandth of the samples")
    smoke = parser.parse_args().smoke
    starts = {bucket_batches: start(100 if smoke else 100_000, bucket_batches, rounds=1 if smoke else 3) for bucket_batches in BUCKETS}
    measured = {
        "samples": 1_000_000 if smoke else 1_000_000_000,
        "cpu_seconds": {str(buckets): round(seconds, 3) for buckets, (seconds, _) in starts.items()},
        "megabytes": {str(buckets): round(megabytes, 1) for buckets, (_, megabytes) in starts.items()},
        "padding": {
            f"median {median} s": {str(buckets): round(padding(buckets, median=median, batches=64), 3) for buckets in BUCKETS}
            for median in ((5.75,) if smoke else (3.7, 5.75))
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
