"""One rank's trouble on several ranks: no numbers, a flipped bit, under every engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_run, write_squares

from clipscale import checkpoints
from clipscale.config import Run, validate
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.parallel.parts import own_part
from clipscale.train import train
from clipscale.training_step import TrainingStep


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), samples=48)


def settings(folder: Path, squares: Path, engine: Any, **changes: Any) -> dict[str, Any]:
    made = tiny_run(folder, squares, engine=engine, steps=4, checkpoints={"every_steps": 1, "keep_last": 9}, **changes)
    if engine != "ddp":
        del made["towers"]["text"]["cached_rows"]
    return made


def train_with_a_bad_rank(mesh: Mesh, values: dict[str, Any], how: str) -> str:
    """On each rank: train; on rank 1 the third step's pixels are no numbers, or one of its weights has lost a bit."""
    whole, steps = TrainingStep._prepare, [0]

    def broken(self: TrainingStep, rows: Any) -> Any:
        steps[0] += 1
        prepared = whole(self, rows)
        if mesh.rank == 1 and steps[0] == 3 and how == "nan":
            prepared["image_text"]["image"]["pixels"][1] = math.nan
        if mesh.rank == 1 and steps[0] == 3 and how == "flip":
            own_part(next(self.trainable.model.parameters()).detach()).view(torch.int32).view(-1)[0] ^= 1
        return prepared

    TrainingStep._prepare = broken  # type: ignore[method-assign]
    try:
        return train(validate(Run, values), mesh).ended
    finally:
        TrainingStep._prepare = whole  # type: ignore[method-assign]


ENGINES = [("ddp", 2), ("fsdp2", 2), ({"name": "fsdp2", "shard_ranks": 1}, 2), ({"name": "deepspeed", "stage": 1}, 2)]
ENGINES += [({"name": "deepspeed", "stage": 3}, 2)]


@pytest.mark.parametrize(("engine", "world"), ENGINES, ids=str)
def test_no_number_on_one_rank_leaves_the_step_out_on_all(
    tmp_path: Path, squares: Path, ranks: Callable[[int], Any], engine: Any, world: int
) -> None:
    assert ranks(world)(train_with_a_bad_rank, settings(tmp_path, squares, engine), "nan") == ["finished"] * world
    saved = [checkpoints.load(tmp_path / "tiny" / "checkpoints" / f"step-{step:08d}").tensors for step in (2, 3, 4)]
    two, three, four = ({f"{file}/{name}": value for file, of in tensors.items() for name, value in of.items()} for tensors in saved)
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert any(not torch.equal(three[name], four[name]) for name in three)
    (told,) = [event for event in read_json_lines(tmp_path / "tiny" / "events.jsonl") if event["event"] == "left out"]
    assert told["step"] == 3
    assert told["detail"].startswith("image_text: rank 1 of 2: x is not finite in 1 of 6 rows, first in row 1 (samples ")


def how_it_ended(mesh: Mesh, values: dict[str, Any]) -> str:
    try:
        return train_with_a_bad_rank(mesh, values, "flip")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("engine", "world"), [("ddp", 3), ({"name": "fsdp2", "shard_ranks": 1}, 2)], ids=str)
def test_a_flipped_bit_of_one_copy_ends_the_run_before_it_is_saved(
    tmp_path: Path, squares: Path, ranks: Callable[[int], Any], engine: Any, world: int
) -> None:
    ends = ranks(world)(how_it_ended, settings(tmp_path, squares, engine))
    assert all(end.startswith("ReplicasDiffer: step 3: copies of the weights are no longer the same: ") for end in ends)
    assert ("differs on rank 1;" in ends[0] or "differs on rank 1." in ends[0]) == (world == 3), "of two copies nobody knows the right one"
    newest, _ = checkpoints.find_newest(tmp_path / "tiny" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000002"
