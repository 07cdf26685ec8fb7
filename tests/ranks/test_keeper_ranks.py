"""Checkpoints of several ranks: under every engine a save holds its own step's state, and what fails on rank 0 ends all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_steps import Steps, step_once, trainable_for
from torch import Tensor

from clipscale import checkpoints
from clipscale.checkpoints.keeper import Keeper
from clipscale.errors import CheckpointError
from clipscale.parallel.mesh import Mesh

ENGINES: list[dict[str, Any]] = [
    {"name": "local"},
    {"name": "ddp"},
    {"name": "fsdp2"},
    {"name": "fsdp2", "tensor_ranks": 2},
    *({"name": "deepspeed", "stage": stage} for stage in (1, 2, 3)),
]


def keeper_of(mesh: Mesh, folder: str, **settings: Any) -> Keeper:
    """The keeper of a run that writes no events."""
    return Keeper(
        checkpoints.Checkpoints(**settings), mesh, run_folder=Path(folder), store=None, expected_bytes=0, tell=lambda *_, **__: None
    )


def save_and_go_on(mesh: Mesh, steps: Steps, folder: str) -> dict[str, dict[str, Tensor]]:
    """Saves after the first step, and trains on at once; returns rank 0's state after the first step, copied there and then."""
    trainable, data = trainable_for(mesh, steps)
    keeper = keeper_of(mesh, folder)
    step_once(trainable, data, steps, 0)
    expected = {file: {name: value.clone() for name, value in tensors.items()} for file, tensors in trainable.state().items()}
    keeper.save(1, tensors=trainable.state, state={}, config="", wait=False)
    for step in (1, 2):
        step_once(trainable, data, steps, step)
    keeper.finish()
    now = trainable.state()
    if mesh.is_main:
        assert any(not torch.equal(now["model"][name], value) for name, value in expected["model"].items()), "later steps change weights"
    return expected if mesh.is_main else {}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: "-".join(map(str, engine.values())))
def test_a_save_holds_the_state_of_its_step_while_training_goes_on(ranks, tmp_path: Path, engine: dict[str, Any]) -> None:
    steps = Steps(engine=engine, dtype="float32", batch=3)
    expected = ranks(1 if engine["name"] == "local" else 2)(save_and_go_on, steps, str(tmp_path))[0]
    saved = checkpoints.load(tmp_path / "checkpoints" / "step-00000001").tensors
    assert {file: set(tensors) for file, tensors in saved.items()} == {file: set(tensors) for file, tensors in expected.items()}
    assert all(torch.equal(value, expected[file][name]) for file, tensors in saved.items() for name, value in tensors.items())


def fail_and_look(mesh: Mesh, folder: str, wait: bool) -> list[str]:
    """What each rank hears of a save that fails on rank 0, and whether it still answers."""
    keeper, heard = keeper_of(mesh, folder, failures_allowed=0), []
    tensors = {"model": {"w": torch.ones(3)}, "optimizer": {}}
    try:
        keeper.save(1, tensors=lambda: tensors, state={}, config="", wait=wait)
        assert not wait, "a save that was waited for and failed returned"
        while not (news := mesh.all_reduce_max(keeper.news())):
            pass
        keeper.due(2, news=news, loss=0.0)
    except CheckpointError as error:
        heard.append(str(error))
    mesh.barrier()
    return heard


@pytest.mark.parametrize("wait", [True, False])
def test_what_fails_in_rank_0s_thread_is_raised_on_all_ranks(ranks, tmp_path: Path, wait: bool) -> None:
    (tmp_path / "checkpoints").touch()
    heard = ranks(2)(fail_and_look, str(tmp_path), wait)
    assert [len(lines) for lines in heard] == [1, 1]
    assert all("could not be written" in lines[0] for lines in heard)
    assert "met on rank 0 of 2" in heard[1][0]


def ask(mesh: Mesh, folder: str) -> list[bool]:
    """Whether each rank takes a checkpoint after each of two steps; the file that asks was there before the first."""
    keeper = keeper_of(mesh, folder)
    due = []
    for step in (1, 2):
        due.append(keeper.due(step, news=mesh.all_reduce_max(keeper.news()), loss=0.0))
        if due[-1]:
            keeper.save(step, tensors=lambda: {"model": {}, "optimizer": {}}, state={}, config="", wait=True)
    return due


def test_a_checkpoint_that_one_rank_is_asked_for_all_ranks_take(ranks, tmp_path: Path) -> None:
    (tmp_path / "save").touch()
    assert ranks(2)(ask, str(tmp_path)) == [[True, False]] * 2
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
