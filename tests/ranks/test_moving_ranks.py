"""A run moves between engines and numbers of ranks through its checkpoints, and its curve is that of the run nobody moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_ranks import curve, run_training
from tiny import BERT, TEXT_TOWER, tiny_run, write_squares

from clipscale.errors import ConfigError
from clipscale.parallel.mesh import Mesh

DDP, LOCAL = {"name": "ddp"}, {"name": "local"}
JOURNEYS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "from many to one": [(2, DDP), (4, {"name": "fsdp2", "tensor_ranks": 2}), (3, {"name": "fsdp2", "gathered": "block"}), (1, LOCAL)],
    "through deepspeed": [(4, {"name": "deepspeed", "stage": 3}), (2, {"name": "deepspeed"}), (2, {"name": "fsdp2"}), (1, LOCAL)],
}
STEPS = 20


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), samples=48)


def settings(folder: Path, squares: Path, **changes: Any) -> dict[str, Any]:
    """A run of which everything trains, without dropout, whose masks differ from rank to rank; steps as long as gradients."""
    made = tiny_run(folder, squares, steps=STEPS, optimizer={"lr": 0.01, "eps": 1e-3, "clip_norm": 1.0}, micro_batch=2, **changes)
    bert = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made["towers"]["text"] = {"name": "hf_text", "config": bert, "tokenizer": TEXT_TOWER["tokenizer"]}
    made["checkpoints"] = {"every_steps": STEPS}
    return made


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> torch.Tensor:
    """Loss and norm of every step of the run on one process."""
    folder = tmp_path_factory.mktemp("unmoved")
    run_training(Mesh.single(), settings(folder, squares, name="unmoved"), None)
    return curve(folder / "unmoved")


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_run_moves_between_engines_and_numbers_of_ranks(
    tmp_path: Path, squares: Path, unmoved: torch.Tensor, ranks: Callable[[int], Any], journey: str
) -> None:
    stations = JOURNEYS[journey]
    for number, (world, engine) in enumerate(stations, start=1):
        ranks(world)(run_training, settings(tmp_path, squares, name="moved", engine=engine), STEPS * number // len(stations))
    moved = curve(tmp_path / "moved")
    assert moved.shape == unmoved.shape
    assert torch.allclose(moved[:, 0], unmoved[:, 0], rtol=1e-5)
    assert torch.allclose(moved[:, 1], unmoved[:, 1], rtol=1e-4), "norms are of differences, and keep fewer digits"


REFUSALS: list[tuple[int, dict[str, Any], str]] = [
    (4, {"engine": {"name": "fsdp2", "tensor_ranks": 3}}, "engine.tensor_ranks 3 does not divide the 4 ranks; these do: 1, 2, 4"),
    (
        4,
        {"engine": {"name": "fsdp2", "tensor_ranks": 2, "shard_ranks": 4}},
        "shard_ranks 4 does not divide the 2 data ranks",
    ),
    (4, {"engine": {"name": "fsdp2", "tensor_ranks": 4}}, r"tensor_ranks 4 does not suit the text tower: .* 2 heads .* these do: 1, 2"),
    (2, {"engine": {"name": "fsdp2", "shard_ranks": 3}}, "engine.shard_ranks 3 does not divide the 2 data ranks.*these do: 1, 2"),
    (1, {"engine": {"name": "fsdp2", "cpu_offload": True}}, "need several ranks"),
    (1, {"engine": "deepspeed"}, "there is 1; set engine: local"),
    (2, {"engine": "deepspeed", "optimizer": {"name": "lamb", "lr": 0.1}}, "optimizer 'lamb' looks at whole weights"),
    (
        2,
        {"engine": {"name": "deepspeed", "stage": 3}, "optimizer": {"lr": 0.1, "average_decay": 0.9}},
        "it keeps no average of the weights",
    ),
]


@pytest.mark.parametrize(("world", "changes", "message"), REFUSALS)
def test_what_an_engine_cannot_do_is_refused_on_every_rank_before_anything_is_written(
    tmp_path: Path, squares: Path, ranks: Callable[[int], Any], world: int, changes: dict[str, Any], message: str
) -> None:
    asked = settings(tmp_path, squares) | changes
    asked["pair_kinds"]["image_text"]["global_batch"] = 12
    with pytest.raises(ConfigError, match=message):
        ranks(world)(run_training, asked, None)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_must_divide_the_data_ranks_not_all_ranks(tmp_path: Path, squares: Path, ranks: Callable[[int], Any]) -> None:
    asked = settings(tmp_path, squares, engine={"name": "fsdp2", "tensor_ranks": 2})
    asked["pair_kinds"]["image_text"]["global_batch"] = 7
    with pytest.raises(
        ConfigError, match=r"global_batch 7 is not a multiple of the 2 data ranks \(of 4 ranks, 2 each\); nearest that fit: 6, 8"
    ):
        ranks(4)(run_training, asked, None)
    asked["pair_kinds"]["image_text"]["global_batch"] = 6
    assert ranks(4)(run_training, asked, 1) == ["stopped"] * 4
