"""What ranks tell each other about a step: their work adds up to one process's, whoever shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BERT, TEXT_TOWER, tiny_run

from clipscale.config import Run, validate
from clipscale.parallel.mesh import Mesh
from clipscale.phases import phase, timing
from clipscale.run_model import build_model
from clipscale.throughput import Meter


def step_of(mesh: Mesh, settings: dict[str, Any]) -> dict[str, Any]:
    """A rank's line about a step in which it was fed its rows, and met the others once; and the largest signal."""
    run = validate(Run, settings)
    with torch.device("cpu" if mesh.is_main else "meta"):
        meter = Meter(run, build_model(run), mesh)
    own = 12 // run.engine.data_ranks(mesh.world)
    tokens = torch.zeros(own, 7, dtype=torch.int64)
    meter.feed({"image_text": {"image": {"pixels": torch.zeros(own, 3, 16, 16)}, "text": {"tokens": tokens, "mask": tokens}}})
    with timing(mesh.device) as timer:
        with phase("contrast"):
            mesh.all_reduce_sum(torch.zeros(1))
        end = meter.end_step(timer, signal=10 * mesh.rank, save=mesh.world - mesh.rank)
    return {**end.times.record(), "signal": end.signal, "save": end.save}


@pytest.mark.parametrize("engine", ["ddp", {"name": "fsdp2", "tensor_ranks": 2}], ids=["ddp", "tensor parallel"])
def test_ranks_share_the_work_of_one_process_and_all_know_it(tmp_path: Path, ranks: Callable[[int], Any], engine: Any) -> None:
    settings = tiny_run(tmp_path, tmp_path / "none", engine=engine)
    settings["towers"]["image"] |= {"layers": 0}
    settings["towers"]["text"] = {"name": "hf_text", "config": BERT, "tokenizer": TEXT_TOWER["tokenizer"]}
    image = 2 * 64 * 8 * 27 + 2 * 64 * 16 * 8 + 2 * 16 * 16  # two convolutions and the projection of 16 numbers to 16
    text = 2 * 7 * (4 * 32 * 32 + 2 * 32 * 32) + 4 * 7 * 7 * 32 + 2 * 32 * 16  # a block of width 32 on 7 tokens, and its projection
    contrast = 3 * 2 * 12 * 12 * 16  # logits of 12 pairs of 16 numbers, and a gradient for either side
    answers = ranks(4)(step_of, settings)
    assert [answer["flops"] for answer in answers] == [12 * 3 * (image + text) + contrast] * 4
    assert answers == [answers[0]] * 4, "one exchange tells everyone the same"
    assert (answers[0]["signal"], answers[0]["save"]) == (30, 4), "the largest of all ranks"
    assert answers[0]["phases"]["communication"] > 0
