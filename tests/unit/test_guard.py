"""The guard's arithmetic, by hand; and runs that meet losses which do not count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_run, write_squares
from torch import nn

from clipscale import checkpoints
from clipscale.config import Run, validate
from clipscale.errors import NonFiniteLoss
from clipscale.guard import Guard, GuardSettings
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.train import train
from clipscale.training_step import TrainingStep

MESH = Mesh.single()


def filled(losses: list[float], **settings: Any) -> Guard:
    guard = Guard(GuardSettings(**settings))
    for loss in losses:
        guard.counted({"a": loss})
    return guard


def test_a_spike_is_so_many_robust_deviations_above_the_median() -> None:
    guard = filled([1.0, 2.0, 3.0, 4.0] * 5, spike=10)
    assert guard.limits["a"] == pytest.approx(2.5 + 10 * 1.4826 * 1.0), "median 2.5; deviations 1.5, 0.5, 0.5, 1.5, whose median is 1"
    assert filled([2.0] * 20, spike=10).limits["a"] == pytest.approx(2.0 + 10 * 0.02), "a hundredth of the median, where nothing deviates"
    guard.rolled_back()
    assert guard.limits == {}, "losses from before are no measure for what comes"


@pytest.mark.parametrize(("losses", "settings"), [([1.0] * 19, {"spike": 1.0}), ([1.0] * 50, {})])
def test_nothing_is_a_spike_before_twenty_losses_or_when_it_was_not_asked_for(losses: list[float], settings: dict[str, Any]) -> None:
    assert filled(losses, **settings).limits == {}


def test_only_steps_of_the_window_are_counted_together() -> None:
    guard = Guard(GuardSettings(max_left_out=1, window=10, max_rollbacks=1))
    assert [guard.leave_out(step, "x") for step in (1, 11, 20)] == ["go on", "go on", "roll back"]
    guard.rolled_back()
    assert [guard.leave_out(step, "y") for step in (11, 12)] == ["go on", "stop"]
    assert guard.left_out == 5
    assert "gone back 1 times: step 11: y; step 12: y" in guard.why_it_stops()


def test_a_guard_that_was_saved_judges_as_the_one_that_went_on() -> None:
    guard = filled([1.0, 2.0] * 12, spike=3.0, max_left_out=1)
    guard.leave_out(5, "nan")
    again = Guard(GuardSettings(spike=3.0, max_left_out=1))
    again.take_up(guard.state())
    assert again.limits == guard.limits != {}
    assert (again.leave_out(6, "nan"), again.left_out) == ("roll back", 2)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), samples=48)


def make(folder: Path, squares: Path, **changes: Any) -> Run:
    return validate(Run, tiny_run(folder, squares, **changes))


def break_batches(monkeypatch: pytest.MonkeyPatch, batches: range) -> None:
    """Pixels of these batches, counted from 1 in the order they are taken, are no numbers."""
    whole, taken = TrainingStep._prepare, [0]

    def broken(self: TrainingStep, rows: Any) -> Any:
        taken[0] += 1
        prepared = whole(self, rows)
        if taken[0] in batches:
            prepared["image_text"]["image"]["pixels"] = torch.full_like(prepared["image_text"]["image"]["pixels"], math.nan)
        return prepared

    monkeypatch.setattr(TrainingStep, "_prepare", broken)


def events(run: Run, name: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(run.run_folder / "events.jsonl") if event["event"] == name]


def tensors_at(run: Run, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoints.load(run.run_folder / "checkpoints" / f"step-{step:08d}")
    return {f"{file}/{name}": value for file, values in saved.tensors.items() for name, value in values.items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_step_without_numbers_changes_nothing_and_is_told(
    tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    run = make(tmp_path, squares, checkpoints={"every_steps": 1, "keep_last": 9}, steps=4, micro_batch=micro_batch)
    break_batches(monkeypatch, range(3, 4) if micro_batch is None else range(13, 14))  # three micro-batches, each encoded twice
    assert train(run, MESH).ended == "finished"
    assert equal(tensors_at(run, 2), tensors_at(run, 3))
    assert not equal(tensors_at(run, 3), tensors_at(run, 4))
    records = read_json_lines(run.run_folder / "metrics.jsonl")
    assert [record["loss"] is None for record in records] == [False, False, True, False]
    assert [record.get("left_out", 0) for record in records] == [0, 0, 1, 1]
    (told,) = events(run, "left out")
    assert told["step"] == 3
    assert "x is not finite in" in told["detail"]
    assert "(samples " in told["detail"]
    again = make(tmp_path, squares, checkpoints={"every_steps": 1, "keep_last": 9}, steps=4, micro_batch=micro_batch, name="again")
    train(again, MESH, stop_after=2)
    with monkeypatch.context() as patch:
        break_batches(patch, range(1, 2))
        train(again, MESH, stop_after=3)
    train(again, MESH)
    assert read_json_lines(again.run_folder / "metrics.jsonl")[-1]["left_out"] == 1, "a resumed run goes on counting"


def test_a_run_goes_back_and_past_the_data_that_led_astray(tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"checkpoints": {"every_steps": 2, "keep_last": 9}, "steps": 8, "guard": {"max_left_out": 1}}
    untroubled = make(tmp_path, squares, name="untroubled", **changes)
    train(untroubled, MESH)
    by_hand = make(tmp_path, squares, name="by_hand", **changes)
    train(by_hand, MESH, stop_after=4)
    folder = by_hand.run_folder / "checkpoints"
    at_four = checkpoints.load(folder / "step-00000004")
    after_six = checkpoints.load(untroubled.run_folder / "checkpoints" / "step-00000006").state["data"]
    moved = {**at_four.state, "data": after_six}
    checkpoints.save(folder, step=4, tensors=at_four.tensors, state=moved, config=(folder / "step-00000004" / "config.yaml").read_text())
    train(by_hand, MESH)

    with monkeypatch.context() as patch:
        break_batches(patch, range(5, 7))
        troubled = make(tmp_path, squares, name="troubled", **changes)
        assert train(troubled, MESH).ended == "finished"
    assert equal(tensors_at(troubled, 8), tensors_at(by_hand, 8))
    steps = [record["step"] for record in read_json_lines(troubled.run_folder / "metrics.jsonl")]
    assert steps == list(range(1, 9))
    (told,) = events(troubled, "rolled back")
    assert told["step"] == 4
    assert "from step 6" in told["detail"]
    assert "step 5: image_text: rank 0 of 1: x is not finite" in told["detail"]


def test_a_run_that_going_back_does_not_help_stops_with_the_evidence(
    tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_batches(monkeypatch, range(3, 1000))
    run = make(tmp_path, squares, guard={"max_left_out": 1, "max_rollbacks": 1}, steps=10)
    with pytest.raises(NonFiniteLoss, match=r"gone back 1 times: step 3: image_text: rank 0 of 1: x is not finite .*; step 4: "):
        train(run, MESH)
    assert len(events(run, "rolled back")) == 1
    assert [record["step"] for record in read_json_lines(run.run_folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_batches(monkeypatch, range(1, 1000))
    with pytest.raises(NonFiniteLoss, match="no checkpoint to go back to: step 1: "):
        train(make(tmp_path, squares, guard={"max_left_out": 0}), MESH)


def test_a_spike_is_left_out_where_asked_for(tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, squares, steps=26, checkpoints={"every_steps": 1, "keep_last": 9}, guard={"spike": 30.0}, optimizer={"lr": 1e-5})
    whole, taken = TrainingStep._prepare, [0]

    def mixed(self: TrainingStep, rows: Any) -> Any:
        taken[0] += 1
        prepared = whole(self, rows)
        if taken[0] == 24:  # the temperature of a model gone wrong: the same embeddings, another scale
            model = self.trainable.model
            assert isinstance(model, nn.Module)
            with torch.no_grad():
                next(iter(model.log_scale.parameters())).add_(5.0)
        return prepared

    monkeypatch.setattr(TrainingStep, "_prepare", mixed)
    train(run, MESH)
    first, *_ = events(run, "left out")
    assert first["step"] == 24
    assert "a spike: the limit was" in first["detail"]


def test_a_rarer_pair_kind_with_a_larger_loss_is_no_spike() -> None:
    guard = Guard(GuardSettings(spike=10))
    for step in range(40):
        guard.counted({"often": 1.0} if step % 2 else {"often": 1.0, "seldom": 9.0})
    assert guard.limits == {"often": pytest.approx(1.1), "seldom": pytest.approx(9.9)}
