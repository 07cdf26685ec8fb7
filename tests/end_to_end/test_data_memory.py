"""Memory of reading: the same after many epochs, in the training process and all of its workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from making_data import write_dataset

READER = """
import json, multiprocessing, os, sys, warnings
import torch
from clipscale.data.sources.shards import Shards
from clipscale.data.stream import training_batches
from clipscale.inputs import ImageInput, SpeechInput
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
leak = []

def own_bytes(process):
    with open(f"/proc/{process}/smaps_rollup") as file:
        fields = dict(line.split(":") for line in file if ":" in line and "kB" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))

stream = training_batches({name: Shards(url=f"{sys.argv[1]}/{name}") for name in ("one", "two")}, kind="pairs",
    modalities=("image", "speech"), inputs={"image": ImageInput(size=64), "speech": SpeechInput(max_seconds=1.0)},
    global_batch=40, seed=0, workers=2, bucket_batches=4)
sizes = []
for epoch in range(20):
    for _ in range(6):
        batch = next(stream)
        leak.append(bytearray(int(sys.argv[2]) // 6))
    sizes.append(sum(own_bytes(process.pid) for process in multiprocessing.active_children()) + own_bytes(os.getpid()))
print(json.dumps({"epochs": stream.epochs(), "bytes": sizes}))
"""


def slope(folder: Path, *, leak: int) -> float:
    """Bytes an epoch by which the processes grow together, over the last 15 of 20 epochs."""
    command = [sys.executable, "-c", READER, str(folder), str(leak)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    found = json.loads(run.stdout)
    assert found["epochs"] == {"one": 20.0, "two": 20.0}
    return float(np.polyfit(np.arange(15), found["bytes"][5:], 1)[0])


def test_memory_is_flat_over_20_epochs_with_workers(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, [20, 30, 10, 40, 20], speech=True)
    assert slope(tmp_path, leak=0) < 1e6
    assert slope(tmp_path, leak=2_000_000) > 1e6  # the measurement sees what it should see
