"""The data of a run: a stream of batches for every pair kind, as this rank reads them, and what reading took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipscale.config import Run
from clipscale.data.sample import Batch
from clipscale.data.stream import TrainingStream, resume_batches
from clipscale.inputs import Input, Modality
from clipscale.parallel.mesh import Mesh


def open_streams(
    run: Run, inputs: Mapping[Modality, Input], mesh: Mesh, *, places: Mapping[str, dict[str, Any]]
) -> dict[str, TrainingStream]:
    """By pair kind; from the beginning, or from where a checkpoint's streams stood.

    Args:
        inputs: what the towers are fed.
        mesh: the ranks that split the global batch.
        places: by pair kind, what its stream's `state` was.

    Raises:
        RequestError: a source is not the one that a place was taken in.
    """
    return {
        name: resume_batches(
            places.get(name),
            kind.sources,
            allow_change=run.data.allow_change,
            kind=name,
            modalities=kind.modalities,
            inputs=inputs,
            global_batch=kind.global_batch,
            seed=run.seed,
            rank=mesh.rank,
            world=mesh.world,
            workers=run.workers,
            lanes=run.lanes,
            bucket_batches=kind.bucket_batches,
            pin_memory=mesh.device.type == "cuda",
        )
        for name, kind in run.pair_kinds.items()
    }


def reading_times(batches: Mapping[str, Batch], streams: Mapping[str, TrainingStream]) -> dict[str, dict[str, float]]:
    """What this rank's rows of each source took to read, and how long their pair kind's batch was waited for."""
    return {
        f"{kind}/{source}": {**took, "batch_wait_seconds": streams[kind].waited_s}
        for kind, batch in batches.items()
        for source, took in batch.reading.items()
    }
