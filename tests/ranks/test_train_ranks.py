"""Training on several gloo ranks: the same run as on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_run, write_squares, write_tones

from clipscale import checkpoints
from clipscale.config import Run, validate
from clipscale.errors import ConfigError, DataError
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Squares and tones."""
    folder = tmp_path_factory.mktemp("data")
    return write_squares(folder, samples=48), write_tones(folder, samples=24)


def settings(folder: Path, data: tuple[Path, Path], **changes: Any) -> dict[str, Any]:
    """A tiny ddp run whose batches 1, 2, 3 and 4 ranks can share; no dropout, whose masks differ from rank to rank."""
    made = tiny_run(folder, *data, engine="ddp", **changes)
    made["towers"]["speech"]["dropout"] = 0.0
    made["pair_kinds"]["speech_text"]["global_batch"] = 12
    return made


def run_training(mesh: Mesh, values: dict[str, Any], stop_after: int | None) -> str:
    """On each rank: train; how it ended."""
    return train(validate(Run, values), mesh, stop_after=stop_after).ended


def curve(folder: Path) -> torch.Tensor:
    """Loss and gradient norm of every step."""
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in read_json_lines(folder / "metrics.jsonl")])


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights."""
    newest, _ = checkpoints.find_newest(folder / "checkpoints")
    assert newest is not None
    return checkpoints.load(newest).tensors["model"]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_ranks_train_the_run_of_one_process(
    tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any], world: int, micro_batch: int | None
) -> None:
    alone = settings(tmp_path, data, name="alone")
    run_training(Mesh.single(), alone, None)
    shared = settings(tmp_path, data, name="shared", micro_batch=micro_batch)
    assert ranks(world)(run_training, shared, None) == ["finished"] * world
    assert torch.allclose(curve(tmp_path / "shared"), curve(tmp_path / "alone"), rtol=2e-4), "float32 sums in another order, six steps on"


def test_a_run_may_go_on_with_another_number_of_ranks(tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any]) -> None:
    run_training(Mesh.single(), settings(tmp_path, data, name="alone"), None)
    moved = settings(tmp_path, data, name="moved")
    for world, stop_after in ((3, 2), (1, 3), (2, None)):
        ranks(world)(run_training, moved, stop_after)
    assert torch.allclose(curve(tmp_path / "moved"), curve(tmp_path / "alone"), rtol=2e-4)


def test_a_resumed_run_on_the_same_ranks_is_the_same_bit_for_bit(
    tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any]
) -> None:
    ranks(2)(run_training, settings(tmp_path, data, name="once"), None)
    for stop_after in (3, None):
        ranks(2)(run_training, settings(tmp_path, data, name="twice"), stop_after)
    assert (tmp_path / "once" / "metrics.jsonl").read_bytes() == (tmp_path / "twice" / "metrics.jsonl").read_bytes()
    once, twice = final_weights(tmp_path / "once"), final_weights(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_every_rank_refuses_a_wrong_request_and_nothing_is_written(
    tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any]
) -> None:
    with pytest.raises(ConfigError, match="set engine: ddp"):
        ranks(2)(run_training, settings(tmp_path, data) | {"engine": "local"}, None)
    with pytest.raises(ConfigError, match="'adafactor' needs whole tensors"):
        ranks(2)(run_training, settings(tmp_path, data) | {"engine": "fsdp2", "optimizer": {"name": "adafactor", "lr": 0.01}}, None)
    with pytest.raises(DataError, match="nowhere"):
        ranks(2)(run_training, settings(tmp_path, (tmp_path / "nowhere", data[1])), None)
    assert list(tmp_path.iterdir()) == []


def test_dense_and_every_grid_train_the_same_run(tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any]) -> None:
    contrasts = [{"method": "dense"}, {"grid_rows": 1}, {"grid_rows": 2, "tile_rows": 3, "tile_columns": 2}]
    for number, contrast in enumerate(contrasts):
        ranks(2)(run_training, settings(tmp_path, data, name=f"grid{number}", contrast=contrast), None)
    for number in (1, 2):
        assert torch.allclose(curve(tmp_path / f"grid{number}"), curve(tmp_path / "grid0"), rtol=2e-4)


def test_tars_without_an_index_train_and_go_on_with_other_ranks(
    tmp_path: Path, data: tuple[Path, Path], ranks: Callable[[int], Any]
) -> None:
    """3 tars of 20, 20 and 8: 12 steps of 12 are three epochs; the finished ones of both ranks stand in the checkpoint."""
    run = tiny_run(tmp_path, data[0], engine="ddp", steps=12)
    run["pair_kinds"]["image_text"]["sources"]["squares"] |= {"name": "tars", "shuffle_samples": 4}
    for world, stop_after in ((2, 5), (1, 8), (3, None)):
        ranks(world)(run_training, run, stop_after)
    newest, _ = checkpoints.find_newest(tmp_path / "tiny" / "checkpoints")
    assert newest is not None
    state = checkpoints.load(newest).state["data"]["image_text"]
    finished = state["finished"]["squares"]
    assert finished["before"] >= 3
    assert state["batches"] == 12
    assert [record["bad_samples"] for record in read_json_lines(tmp_path / "tiny" / "metrics.jsonl")] == [0] * 12
