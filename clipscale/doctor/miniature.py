"""A run in miniature: one step of its own model on its own data, with a batch of a few rows; nothing is written."""

from __future__ import annotations

import time
from functools import partial

import torch

from clipscale.config import Run, validate
from clipscale.doctor.finding import Finding
from clipscale.model import Encoders
from clipscale.parallel.mesh import Mesh
from clipscale.run_data import open_streams
from clipscale.run_model import build_model, check_precision, steps_differ, use_precision
from clipscale.training_step import Taken, TrainingStep

GIB = 2**30
_ROWS = 4  # of a global batch, for each rank
_BYTES_A_PARAMETER = 20  # fp32 weights, gradients, two moments, and something for activations


def one_step(run: Run, mesh: Mesh, shapes: Encoders) -> Finding:
    """One optimizer step with the run's engine, or in one process where it was not launched as ranks. All ranks ask together.

    Args:
        shapes: the run's model on the meta device.
    """
    needed, free = _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in shapes.parameters()), _free_bytes(mesh.device)
    if needed > free * mesh.world:
        return Finding(
            "one step",
            "warning",
            f"left out: the model needs about {needed / GIB:,.1f} GiB, {free / GIB:,.1f} GiB are free",
            "start the doctor as the run is started: launch/torchrun.sh doctor CONFIG.yaml",
        )
    begun = time.perf_counter()
    taken = _take(miniature(run, mesh.world), mesh)
    if taken.fault is not None:
        return Finding(
            "one step",
            "problem",
            f"the first step would not count: {taken.fault}",
            "look at these samples, and at the weights it begins with",
        )
    losses = ", ".join(f"{name} {float(result.loss.detach()):.3f}" for name, (_, result) in taken.losses.items())
    found = f"{time.perf_counter() - begun:,.1f} s with building the model; losses {losses}"
    return Finding("one step", "ok", found)


def miniature(run: Run, world: int) -> Run:
    """The run with few rows a batch, read in the ranks themselves, and every pair kind in every step.

    Raises:
        ConfigError: some setting allows no such batch.
    """
    settings = run.model_dump(mode="json", serialize_as_any=True)
    settings.update(workers=0, lanes=None, micro_batch=None, memory_gb=None)
    if world == 1:
        settings.update(engine="local", contrast={"feature_dtype": run.contrast.feature_dtype})
    ranks = world if world == 1 else run.engine.data_ranks(world)
    for kind in settings["pair_kinds"].values():
        kind.update(global_batch=min(kind["global_batch"] // ranks, _ROWS) * ranks, bucket_batches=1, every=1)
    return validate(Run, settings)


def _take(run: Run, mesh: Mesh) -> Taken:
    """The first step."""
    model = run.engine.build(partial(build_model, run), mesh)
    check_precision(run, model, mesh.device)
    run.engine.check_model(model, optimizer=run.optimizer, steps_differ=steps_differ(run))
    use_precision(run, model)
    data_mesh = run.engine.data_mesh(mesh)
    trainable = run.engine.wrap(model, run.optimizer, mesh, precision=run.precision, steps_differ=steps_differ(run))
    step = TrainingStep(run, trainable, mesh, data_mesh, feed=lambda _: None)
    batches = {name: next(stream) for name, stream in open_streams(run, trainable.model.inputs(), data_mesh, places={}).items()}
    return step.take(1, batches, lr=run.optimizer.lr, micro_batch=None)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
