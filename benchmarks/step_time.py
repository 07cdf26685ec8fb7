"""How long a training step of any configuration takes, and where its time, memory and arithmetic go; on made-up data.

    python benchmarks/step_time.py CONFIG.yaml [key=value ...]       one process; --ranks 2 starts more, torchrun does too
    python benchmarks/step_time.py CONFIG.yaml --compare precision=fp32,bf16 --compare micro_batch=64,256
    python benchmarks/step_time.py CONFIG.yaml --open-clip           beside open_clip's own trainer, with --accum-freq for micro-batches
    python benchmarks/step_time.py --smoke                           seconds

No data are needed and no file of a run is written: every rank has one batch of the configuration's shapes in memory, recordings and
captions as long as the towers take them, and takes the run's own step on it again and again, with every pair kind in it. `--compare`
makes a variant of each value (of several, every combination); variants take their steps in turn, and so does open_clip's trainer, so that
ratios are of one run. On CUDA they are of the median step by events, on the CPU of process time added over ranks, the smallest of all
rounds. What is told of a variant is its median step, whole: phases add up to its seconds. On CUDA, peaks are without what other variants
hold; on the CPU they are what is resident, with all of them. Towers with pretrained weights load them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from clipscale.config import Run, load_run, read_layers, validate
from clipscale.data.sample import Batch
from clipscale.data.speech import collate_speech
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.inputs import ImageInput, Input, SpeechInput
from clipscale.memory.micro_batch import MicroBatch, memory_limit
from clipscale.parallel import mesh as meshes
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer, phase, timing
from clipscale.run_model import build_model, check_precision, use_precision
from clipscale.throughput import Meter, StepTimes
from clipscale.throughput.step import over_ranks, own_numbers
from clipscale.training_step import TrainingStep

SMOKE_ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
SMOKE_RUN = {
    "name": "smoke",
    "steps": 10,
    "embed_dim": 24,
    "towers": {"image": {"name": "open_clip_image", "architecture": "smoke"}, "text": {"name": "open_clip_text", "architecture": "smoke"}},
    "pair_kinds": {
        "image_text": {
            "modalities": ["image", "text"],
            "sources": {"none": {"name": "shards", "url": "none"}},
            "objective": "clip",
            "global_batch": 16,
        }
    },
    "engine": "ddp",
    "optimizer": {"lr": 1e-3},
    "micro_batch": 8,
    "device": "cpu",
}
WORDS = ["a", "photo", "of", "two", "dogs", "that", "run", "over", "the", "wide", "green", "field", "at", "night"]


class OurStep:
    """A run's own step, fed one made-up batch of every pair kind; it reads and writes no file."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        """
        Raises:
            RequestError: the run's engine or device cannot train it.
        """
        data_mesh = run.engine.data_mesh(mesh)
        model = run.engine.build(partial(build_model, run), mesh)
        check_precision(run, model, mesh.device)
        run.engine.check_model(model, optimizer=run.optimizer, steps_differ=False)
        rows = {name: kind.global_batch // data_mesh.world for name, kind in run.pair_kinds.items()}
        limit = memory_limit(run.memory_gb, mesh) if run.micro_batch == "auto" else None
        self.micro_batch = MicroBatch(run.micro_batch, share=max(rows.values()), limit=limit)
        self.meter = Meter(run, model, mesh)
        use_precision(run, model)
        self.trainable = run.engine.wrap(model, run.optimizer, mesh, precision=run.precision, steps_differ=False)
        self.step = TrainingStep(run, self.trainable, mesh, data_mesh, feed=self.meter.feed)
        self.lr, self.count = run.optimizer.lr, 0
        inputs = self.trainable.model.inputs()
        self.batches = {
            name: made_up(name, {modality: inputs[modality] for modality in kind.modalities}, rows[name], seed=data_mesh.rank)
            for name, kind in run.pair_kinds.items()
        }
        if mesh.device.type == "cuda":
            self.batches = {name: batch.pin_memory() for name, batch in self.batches.items()}

    def take(self, timer: PhaseTimer) -> StepTimes:
        """One step of the run, every pair kind in it."""
        self.count += 1
        self.step.take(self.count, self.batches, lr=self.lr, micro_batch=self.micro_batch.rows)
        times = self.meter.end_step(timer, signal=0, save=0).times
        if times.peak_bytes:
            self.micro_batch.learn(max(times.peak_bytes.values()))
        return times


def made_up(kind: str, inputs: dict[Any, Input], rows: int, *, seed: int) -> Batch:
    """A batch of noise, as long as the towers take it."""
    draw = np.random.default_rng(seed)
    made: dict[Any, dict[str, Tensor]] = {}
    for modality, spec in inputs.items():
        if isinstance(spec, ImageInput):
            made[modality] = {"pixels": torch.from_numpy(draw.integers(0, 256, (rows, 3, spec.size, spec.size), dtype=np.uint8))}
        elif isinstance(spec, SpeechInput):
            samples = round(spec.max_seconds * spec.sample_rate)
            one = collate_speech([draw.normal(0, 0.1, samples).astype(np.float32)], spec)
            made[modality] = {name: tensor.expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in one.items()}
        else:
            made[modality] = spec.tokenize([" ".join(draw.choice(WORDS, spec.context_length)) for _ in range(rows)])
    numbers = torch.arange(rows) + seed * rows
    keys = [""] * rows
    return Batch(kind, made, keys, caption_ids=numbers, keys=keys, seeds=numbers, valid=torch.ones(rows, dtype=torch.bool))


class OpenClipStep:
    """The same step by open_clip's trainer: its model, its DDP, its loss, its AdamW; micro-batches by its --accum-freq."""

    def __init__(self, run: Run, mesh: Mesh, batch: Batch) -> None:
        """
        Raises:
            ConfigError: open_clip cannot train what this run trains.
        """
        import open_clip

        architecture, rows = _open_clip_architecture(run), len(batch.keys)
        micro_batch = run.micro_batch if isinstance(run.micro_batch, int) else rows
        if rows % micro_batch:
            raise ConfigError(f"open_clip's --accum-freq takes equal micro-batches: {micro_batch} does not divide {rows} rows of a rank")
        self.mesh = mesh
        pixels = batch.inputs["image"]["pixels"].float() / 128 - 1  # its loader normalises on the host
        pairs = zip(pixels.split(micro_batch), batch.inputs["text"]["tokens"].split(micro_batch), strict=True)
        self.loader = _Loader([tuple(part.pin_memory() for part in pair) if mesh.device.type == "cuda" else pair for pair in pairs])
        self.args = argparse.Namespace(
            device=str(mesh.device),
            precision={"fp32": "fp32", "bf16": "amp_bf16"}[run.precision],
            distill=False,
            accum_freq=len(self.loader),
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=run.optimizer.clip_norm,
            log_every_n_steps=1,
            world_size=mesh.world,
            rank=mesh.rank,
            local_rank=mesh.local_rank,
            batch_size=micro_batch,
            wandb=False,
        )
        model = open_clip.create_model(architecture, device=mesh.device, output_dict=True)
        self.loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=mesh.rank, world_size=mesh.world)
        if mesh.world > 1:
            ids = [mesh.device.index] if mesh.device.type == "cuda" else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-5)

    def take(self, timer: PhaseTimer) -> StepTimes:
        """One step of its optimizer; all of it is one phase."""
        from open_clip_train.train import train_one_epoch

        data = {"train": SimpleNamespace(dataloader=self.loader, set_epoch=lambda _: None)}
        with phase("other"):
            train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, None, None, self.args)
        own = torch.tensor(own_numbers(timer.end_step(), None), dtype=torch.int64, device=self.mesh.device)
        return over_ranks(self.mesh.gather(own).tolist(), peak_flops=None)


class _Loader(list[Any]):
    num_samples = 1

    @property
    def num_batches(self) -> int:
        return len(self)


def _open_clip_architecture(run: Run) -> str:
    towers = [run.towers[name] for name in ("image", "text") if name in run.towers]
    architectures = {getattr(tower, "architecture", None) for tower in towers}
    reasons = {
        "one pair kind of image and text": len(run.pair_kinds) == 1 and len(towers) == 2 == len(run.towers),
        "both towers of one open_clip architecture": len(architectures) == 1 and None not in architectures,
        "nothing locked": not any(tower.locked for tower in towers),
        "the objective clip": all(kind.objective.model_dump()["name"] == "clip" for kind in run.pair_kinds.values()),
        "precision fp32 or bf16": run.precision in ("fp32", "bf16"),
        "whole batches on every rank": run.engine.data_ranks(2) == 2,
    }
    missing = [reason for reason, holds in reasons.items() if not holds]
    if missing:
        raise ConfigError(f"--open-clip compares runs that its trainer can do: {', '.join(missing)} wanted")
    return str(architectures.pop())


def variants(files: Sequence[str], overrides: Sequence[str], compared: Sequence[str]) -> dict[str, Run]:
    """A run of every combination of what is compared, by what tells them apart."""
    choices = []
    for text in compared:
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--compare takes key=value,value: found '{text}'")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return {" ".join(chosen) or "run": load_run(files, [*overrides, *chosen]) for chosen in product(*choices)}


def measure(mesh: Mesh, runs: dict[str, Run], *, steps: int, warmup: int, open_clip: bool) -> dict[str, Any]:
    """Rounds of one step of every variant; what rank 0 prints."""
    takes: dict[str, OurStep | OpenClipStep] = {}
    own_bytes: dict[str, int] = {}
    for name, run in runs.items():
        before = memory_in_use(mesh)
        takes[name] = OurStep(run, mesh)
        own_bytes[name] = memory_in_use(mesh) - before
    if open_clip:
        before, (first_name, run) = memory_in_use(mesh), next(iter(runs.items()))
        ours = takes[first_name]
        assert isinstance(ours, OurStep)
        takes["open_clip"] = OpenClipStep(run, mesh, next(iter(ours.batches.values())))
        own_bytes["open_clip"] = memory_in_use(mesh) - before
    held = {name: sum(own_bytes.values()) - own for name, own in own_bytes.items()}
    taken: dict[str, list[StepTimes]] = {name: [] for name in takes}
    worked: dict[str, list[float]] = {name: [] for name in takes}
    for round_number in range(warmup + steps):
        for name, step in takes.items():
            mesh.barrier()
            with timing(mesh.device) as timer:
                started = time.process_time()
                times = step.take(timer)
                cpu = float(mesh.all_reduce_sum(torch.tensor(time.process_time() - started, dtype=torch.float64, device=mesh.device)))
            if round_number >= warmup:
                taken[name].append(times)
                worked[name].append(cpu)
    pairs = {name: sum(kind.global_batch for kind in run.pair_kinds.values()) for name, run in runs.items()}
    pairs["open_clip"] = next(iter(pairs.values()))
    told = {name: _told(steps, pairs[name], held[name]) for name, steps in taken.items()}
    cost = {name: told[name]["seconds"] if mesh.device.type == "cuda" else min(worked[name]) for name in takes}
    first = next(iter(takes))
    return {**{f"time of {name} over {first}": round(cost[name] / cost[first], 3) for name in list(takes)[1:]}, "variants": told}


def memory_in_use(mesh: Mesh) -> int:
    """Bytes that the variants made so far hold on this rank: on CUDA; on the CPU what is resident cannot be told apart."""
    return torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else 0


def _told(steps: Sequence[StepTimes], pairs: int, held: int) -> dict[str, Any]:
    """The median step."""
    median = sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]
    record = median.record()
    peaks = {name: max(step.peak_bytes[name] for step in steps) - held for name in median.peak_bytes}
    memory = {"peak_bytes": peaks, "memory_bytes": max(peaks.values())} if peaks else {}
    spread = [round(step.seconds, 6) for step in steps]
    return {"samples_per_second": pairs / median.seconds, **record, **memory, "all_seconds": spread, "mean": statistics.mean(spread)}


def work(rank: int, asked: argparse.Namespace, port: int) -> None:
    """One rank."""
    if asked.ranks:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(asked.ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for architecture in asked.architecture:
            import open_clip

            open_clip.add_model_config(Path(architecture))
        runs = smoke_runs(Path(folder)) if asked.smoke else variants(asked.layers, asked.overrides, asked.compare)
        mesh = meshes.start(next(iter(runs.values())).device)
        if mesh.device.type == "cpu":
            torch.set_num_threads(1)
        for run in runs.values():
            run.check_world(mesh.world)
        result = measure(mesh, runs, steps=asked.steps, warmup=asked.warmup, open_clip=asked.open_clip)
        if mesh.is_main:
            device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
            versions = {name: version(name) for name in ("torch", "open_clip_torch", "clipscale")}
            asked_for = {"layers": asked.layers, "overrides": asked.overrides, "steps": asked.steps}
            text = json.dumps({**asked_for, "device": device, "ranks": mesh.world, **result, "versions": versions}, indent=1)
            print(text)
            if asked.output:
                Path(asked.output).write_text(text + "\n")
        meshes.stop(mesh)


def smoke_runs(folder: Path) -> dict[str, Run]:
    """With micro-batches and without, of an architecture made for it."""
    import open_clip

    file = folder / "smoke.json"
    file.write_text(json.dumps(SMOKE_ARCHITECTURE))
    open_clip.add_model_config(file)
    return {name: validate(Run, {**SMOKE_RUN, "micro_batch": size}) for name, size in (("micro_batch=8", 8), ("micro_batch=null", None))}


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("config", nargs="*", help="configuration files and key=value overrides, as for clipscale train")
    arguments.add_argument("--compare", action="append", default=[], metavar="KEY=A,B", help="a variant of each value")
    arguments.add_argument("--open-clip", action="store_true", help="open_clip's own trainer beside the first variant")
    arguments.add_argument("--architecture", action="append", default=[], metavar="FILE.json", help="open_clip architectures of your own")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--warmup", type=int, default=3, help="steps before those that count")
    arguments.add_argument("--ranks", type=int, default=0, help="processes to start; by itself those that torchrun started, or one")
    arguments.add_argument("--output", help="also write the result there")
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    asked = arguments.parse_args()
    if asked.smoke:
        asked.steps, asked.warmup, asked.open_clip = 1, 1, True
    elif not asked.config:
        arguments.error("name a configuration, or --smoke")
    asked.overrides = [item for item in asked.config if "=" in item]
    asked.layers = [item for item in asked.config if "=" not in item]
    try:
        read_layers(asked.layers, asked.overrides)
        if not asked.ranks:
            work(0, asked, 0)
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(work, args=(asked, port), nprocs=asked.ranks)
    except ClipscaleError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
