"""The training loop in one process: resuming, refusing, stopping and what it leaves behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_run, write_squares, write_tones
from torch.nn import functional

from clipscale import checkpoints, train
from clipscale.config import Run, validate
from clipscale.data.sources import Source
from clipscale.data.sources.shards import Shards
from clipscale.data.stream import training_batches
from clipscale.errors import CheckpointError, ConfigError, ContrastError, DataError, NonFiniteLoss, RunError, RunFolderError, ShardError
from clipscale.metrics import read_json_lines
from clipscale.model import prepare
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model

MESH = Mesh.single()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Squares and tones."""
    folder = tmp_path_factory.mktemp("data")
    return write_squares(folder, samples=48), write_tones(folder, samples=24)


def make(folder: Path, data: tuple[Path, Path], **changes: Any) -> Run:
    """A tiny run in `folder`."""
    return validate(Run, tiny_run(folder, *data, **changes))


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights."""
    newest, _ = checkpoints.find_newest(run.run_folder / "checkpoints")
    assert newest is not None
    return checkpoints.load(newest).tensors["model"]


def same(first: Run, second: Run) -> bool:
    """Whether two runs ended with the same metrics and weights, bit for bit."""
    files = [(run.run_folder / "metrics.jsonl").read_bytes() for run in (first, second)]
    ours, theirs = weights(first), weights(second)
    return files[0] == files[1] and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_any_number_of_stops_and_resumes_gives_the_run_nobody_stopped(tmp_path: Path, data: tuple[Path, Path]) -> None:
    once, often = make(tmp_path, data, name="once"), make(tmp_path, data, name="often")
    assert train.train(once, MESH) == train.Outcome("finished", 6)
    for step in (1, 3, 4):
        assert train.train(often, MESH, stop_after=step) == train.Outcome("stopped", step)
    assert train.train(often, MESH) == train.Outcome("finished", 6)
    assert same(once, often)
    events = [(record["event"], record["step"]) for record in read_json_lines(often.run_folder / "events.jsonl")]
    assert ("resumed", 3) in events
    assert train.train(often, MESH) == train.Outcome("already finished", 6)


def test_a_damaged_newest_checkpoint_is_skipped_and_its_steps_are_done_again(tmp_path: Path, data: tuple[Path, Path]) -> None:
    once, hurt = make(tmp_path, data, name="once"), make(tmp_path, data, name="hurt")
    train.train(once, MESH)
    train.train(hurt, MESH, stop_after=4)
    file = hurt.run_folder / "checkpoints" / "step-00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    train.train(hurt, MESH)
    assert same(once, hurt)


def test_a_step_takes_only_the_pair_kinds_that_are_due(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, data)
    train.train(run, MESH)
    steps = read_json_lines(run.run_folder / "metrics.jsonl")
    assert [sorted(record["kinds"]) for record in steps] == [["image_text", "speech_text"], ["image_text"]] * 3
    assert steps[-1]["samples"] == 6 * 12 + 3 * 8


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, data: tuple[Path, Path]) -> None:
    """Without dropout, whose masks depend on how a batch is cut, the first losses agree to fp32 rounding."""
    settings = tiny_run(tmp_path, *data, augment={"image": {"min_area": 0.5, "brightness": 0.5}, "speech": {"gain_db": 3.0}})
    settings["towers"]["speech"]["dropout"] = 0.0
    curves = []
    for micro_batch in (None, 1, 5, 7):
        run = validate(Run, {**settings, "name": f"micro{micro_batch}", "micro_batch": micro_batch})
        train.train(run, MESH)
        curves.append([(record["loss"], record["grad_norm"]) for record in read_json_lines(run.run_folder / "metrics.jsonl")])
    for curve in curves[1:]:
        assert torch.allclose(torch.tensor(curve), torch.tensor(curves[0]), rtol=2e-4), "float32 sums in another order, six steps on"


def test_a_run_folder_with_other_settings_is_refused_and_named(tmp_path: Path, data: tuple[Path, Path]) -> None:
    train.train(make(tmp_path, data), MESH, stop_after=1)
    before = sorted(path.name for path in (tmp_path / "tiny").rglob("*"))
    with pytest.raises(RunFolderError, match=r"optimizer\.lr is 0\.01 there, 0\.02 here"):
        train.train(make(tmp_path, data, optimizer={"lr": 0.02}), MESH)
    assert sorted(path.name for path in (tmp_path / "tiny").rglob("*")) == before
    settings = tiny_run(tmp_path, *data, checkpoints={"every_steps": 5})
    settings["towers"]["speech"]["recompute"] = True
    train.train(validate(Run, settings), MESH, stop_after=2)  # how it runs may change


def test_a_folder_of_something_else_is_refused(tmp_path: Path, data: tuple[Path, Path]) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not a run folder"):
        train.train(make(tmp_path, data), MESH)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_too_little_room_for_checkpoints_is_refused_before_anything_is_written(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, data, checkpoints={"keep_last": 10**12})
    with pytest.raises(RunFolderError, match=r"the checkpoints need about .* MB and .* MB are free"):
        train.train(run, MESH)
    assert not run.run_folder.exists()


def test_missing_data_is_refused_before_anything_is_written(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, (tmp_path / "nowhere", data[1]))
    with pytest.raises(DataError, match="nowhere"):
        train.train(run, MESH)
    assert not run.run_folder.exists()


def test_other_data_under_the_same_name_is_refused_on_resume(tmp_path: Path, data: tuple[Path, Path]) -> None:
    squares = write_squares(tmp_path / "a", samples=48)
    train.train(make(tmp_path, (squares, data[1])), MESH, stop_after=2)
    squares.rename(tmp_path / "old")
    write_squares(tmp_path / "b", samples=40).rename(squares)
    with pytest.raises(
        DataError, match=r"'image_text' was trained on other data.*\n  source 'squares' held 48 samples in 3 shards, holds 40"
    ):
        train.train(make(tmp_path, (squares, data[1])), MESH)
    settings = tiny_run(tmp_path, squares, data[1], data={"allow_change": True})
    settings["pair_kinds"]["image_text"]["sources"]["more"] = {"name": "shards", "url": str(data[0])}
    assert train.train(validate(Run, settings), MESH) == train.Outcome("finished", 6)
    with pytest.raises(RunFolderError, match=r"pair_kinds\.image_text\.sources\.more"):  # it is now the run with these sources
        train.train(make(tmp_path, (squares, data[1])), MESH)
    newest, _ = checkpoints.find_newest(tmp_path / "tiny" / "checkpoints")
    assert newest is not None
    assert (newest / "state.json").stat().st_size <= 4096
    assert checkpoints.load(newest).state["data"]["image_text"]["start"]["batch"] == 2


def test_a_signal_stops_the_run_behind_a_checkpoint_and_it_goes_on(
    tmp_path: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    once, stopped = make(tmp_path, data, name="once"), make(tmp_path, data, name="stopped")
    train.train(once, MESH)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    whole_step = train._Training._train_step

    def interrupted(self: Any, batches: Any) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train._Training, "_train_step", interrupted)
        assert train.train(stopped, MESH) == train.Outcome("stopped", 3, signal=signal.SIGTERM)
    train.train(stopped, MESH)
    assert same(once, stopped)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_that_diverges_ends_with_the_step_named(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, data, optimizer={"lr": 1e30})
    with pytest.raises((NonFiniteLoss, ContrastError), match="step 2"):
        train.train(run, MESH)
    assert all(math.isfinite(record["loss"]) for record in read_json_lines(run.run_folder / "metrics.jsonl"))


def flip_bytes_of_members(shards: Path, *, every: int) -> int:
    """Overwrite every n-th picture inside the tars; returns how many."""
    hurt = 0
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            places = [member.offset_data for member in tar if member.name.endswith(".png")]
        with path.open("r+b") as file:
            for place in places[::every]:
                file.seek(place)
                file.write(b"\0" * 16)
                hurt += 1
    return hurt


def test_unreadable_samples_are_counted_listed_and_left_out(tmp_path: Path, data: tuple[Path, Path]) -> None:
    squares = write_squares(tmp_path / "own", samples=48)
    hurt = flip_bytes_of_members(squares, every=20)
    run = make(tmp_path, (squares, data[1]), steps=4, max_bad_fraction=0.5)  # 4 steps of 12: one epoch of 48
    train.train(run, MESH)
    listed = read_json_lines(run.run_folder / "bad_samples.jsonl")
    assert len(listed) == hurt == read_json_lines(run.run_folder / "metrics.jsonl")[-1]["bad_samples"]
    assert {record["source"] for record in listed} == {"squares"}
    last = read_json_lines(run.run_folder / "metrics.jsonl")[-1]
    assert last["bad_by_source"] == {"squares": {"sample is not the one that was written": hurt}}
    assert {record["key"] for record in listed} == {"000000000000", "000001000000", "000002000000"}  # the first of every 20, as hurt above
    assert {record["where"] for record in listed} == {f"shard 00000{shard}, sample 0" for shard in range(3)}


def test_bad_samples_are_counted_the_same_by_a_run_that_was_stopped(tmp_path: Path, data: tuple[Path, Path]) -> None:
    squares = write_squares(tmp_path / "own", samples=48)
    flip_bytes_of_members(squares, every=20)
    once, often = (make(tmp_path, (squares, data[1]), name=name, steps=8, max_bad_fraction=0.5) for name in ("once", "often"))
    train.train(once, MESH)
    for step in (1, 2, 3, 5, 8):
        train.train(often, MESH, stop_after=step)
    assert same(once, often)
    files = [(run.run_folder / "bad_samples.jsonl").read_bytes() for run in (once, often)]
    assert files[0] == files[1]


def test_the_loss_with_unreadable_samples_is_that_of_the_valid_pairs(tmp_path: Path, data: tuple[Path, Path]) -> None:
    """The first step's loss, computed anew from whole data without the samples that bad_samples.jsonl names."""
    hurt = write_squares(tmp_path / "own", samples=48)
    flip_bytes_of_members(hurt, every=4)
    settings = tiny_run(tmp_path, hurt, steps=1, max_bad_fraction=1.0)
    run = validate(Run, settings)
    train.train(run, MESH)
    bad = {record["key"] for record in read_json_lines(run.run_folder / "bad_samples.jsonl")}
    model = build_model(run)
    whole: dict[str, Source] = {"squares": Shards(url=str(data[0]))}  # the same samples, nothing overwritten
    batch = next(training_batches(whole, kind="k", modalities=("image", "text"), inputs=model.inputs(), global_batch=12, seed=0))
    kept = torch.tensor([key not in bad for key in batch.keys])
    assert 0 < len(bad) < 12
    assert int(kept.sum()) == 12 - len(bad)
    with torch.no_grad():
        x, y = (
            model.encode(modality, prepare(modality, model.inputs()[modality], batch.inputs[modality]))[kept].double()
            for modality in ("image", "text")
        )
    logits = x @ y.T / 0.07
    own = torch.arange(len(logits))
    wanted = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    found = read_json_lines(run.run_folder / "metrics.jsonl")[0]["loss"]
    assert found == pytest.approx(float(wanted), rel=2e-6)  # float32 embeddings and statistics


def test_too_many_unreadable_samples_end_the_run_with_a_list(tmp_path: Path, data: tuple[Path, Path]) -> None:
    squares = write_squares(tmp_path / "own", samples=48)
    flip_bytes_of_members(squares, every=2)
    with pytest.raises(
        ShardError, match=r"could not be read; allowed are 0\.10%; by source and reason:\n  squares: \d+ × sample is not the one"
    ):
        train.train(make(tmp_path, (squares, data[1])), MESH)


def test_bf16_towers_keep_loss_and_temperature_in_fp32(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, data, precision="bf16")
    train.train(run, MESH)
    assert {name: tensor.dtype for name, tensor in weights(run).items() if "log_scale" in name} == {
        "log_scale.image_text": torch.float32,
        "log_scale.speech_text": torch.float32,
    }
    plain = make(tmp_path, data, name="plain")
    train.train(plain, MESH)
    first = [read_json_lines(other.run_folder / "metrics.jsonl")[0]["kinds"]["image_text"] for other in (run, plain)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=2e-2)
    assert first[0]["scale"] == first[1]["scale"]


def test_every_step_and_micro_batch_draws_its_own_random_numbers_and_the_same_ones_again(tmp_path: Path, data: tuple[Path, Path]) -> None:
    training = train._Training(make(tmp_path, data), MESH)
    training.start()
    training.closing.close()

    def draw(step: int, micro_batch: int) -> tuple[float, ...]:
        training.training_step.seed(step, micro_batch)
        return tuple(torch.rand(4).tolist())

    places = [(step, micro_batch) for step in (1, 2, 3) for micro_batch in (0, 1)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(2, 1) == draw(2, 1)


def test_fp8_is_refused_where_it_cannot_be(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = make(tmp_path, data, precision="fp8")
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 .* or above; this device has none, it is a CPU; set bf16"):
        train.train(run, MESH)
    assert not run.run_folder.exists()
    for engine, message in (
        ({"name": "deepspeed"}, "engine 'deepspeed' trains in fp32, bf16 and fp16"),
        ({"name": "fsdp2", "tensor_ranks": 2}, r"fp8 does not go with engine\.tensor_ranks above 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, data, precision="fp8", engine=engine).check_world(2)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def steps_saved(run: Run) -> list[int]:
    """Steps whose checkpoint the events tell of."""
    return [record["step"] for record in read_json_lines(run.run_folder / "events.jsonl") if record["event"] == "checkpoint"]


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Do something in the middle of a run, when no checkpoint is being written."""
    whole_step = train._Training._train_step

    def step(self: Any, batches: Any) -> Any:
        if self.step == number:
            self.keeper._settle()
            do()
        return whole_step(self, batches)

    monkeypatch.setattr(train._Training, "_train_step", step)


def test_a_checkpoint_can_be_asked_for_while_the_run_goes_on(
    tmp_path: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, data, checkpoints={"every_steps": 100})
    before_step(monkeypatch, 3, (run.run_folder / "save").touch)
    train.train(run, MESH)
    assert steps_saved(run) == [3, 6]
    assert not (run.run_folder / "save").exists()


def test_a_run_on_an_empty_folder_goes_on_from_its_store_to_the_same_end(tmp_path: Path, data: tuple[Path, Path]) -> None:
    store = {"checkpoints": {"every_steps": 2, "store": str(tmp_path / "store")}}
    once, moved = make(tmp_path / "once", data), make(tmp_path / "there", data, **store)
    train.train(once, MESH)
    train.train(make(tmp_path / "here", data, **store), MESH, stop_after=3)
    assert train.train(moved, MESH) == train.Outcome("finished", 6)
    ours, theirs = weights(once), weights(moved)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[record["loss"] for record in read_json_lines(run.run_folder / "metrics.jsonl")] for run in (once, moved)]
    assert losses[1] == losses[0][3:], "the steps after the checkpoint"
    other = make(tmp_path / "elsewhere", data, optimizer={"lr": 0.02}, **store)
    with pytest.raises(RunFolderError, match=r"holds another run:\n  optimizer\.lr is 0\.01 there, 0\.02 here"):
        train.train(other, MESH)
    with pytest.raises(DataError, match="pipe: addresses run shell commands"):
        train.train(make(tmp_path / "never", data, checkpoints={"store": "pipe:cat"}), MESH)
    assert not (tmp_path / "never").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 30 MB; a checkpoint takes four."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, *, left_bytes: int = 1 << 16) -> None:
    """Leave no room on a disk but what some lines of the logs take."""
    with suppress(OSError), (place / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(place / "ballast", (place / "ballast").stat().st_size - left_bytes)


def test_a_run_on_a_full_disk_says_so_goes_on_and_saves_when_there_is_room_again(
    small_disk: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(small_disk, data, checkpoints={"every_steps": 1, "keep_last": 2})
    before_step(monkeypatch, 3, lambda: fill(small_disk))
    before_step(monkeypatch, 5, (small_disk / "ballast").unlink)
    assert train.train(run, MESH) == train.Outcome("finished", 6)
    assert "could not be written: [Errno 28] No space left on device, it takes 4.1 MB and 0.1 MB are free" in capsys.readouterr().err
    assert steps_saved(run) == [1, 2, 5, 6]


def test_a_run_that_a_full_disk_ends_leaves_its_last_checkpoint_whole(
    small_disk: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(small_disk, data, checkpoints={"every_steps": 1, "keep_last": 2, "failures_allowed": 0})
    before_step(monkeypatch, 4, lambda: fill(small_disk))
    with pytest.raises(CheckpointError, match=r"step-00000004: could not be written.*No space left.*earlier checkpoints are untouched"):
        train.train(run, MESH)
    newest, damaged = checkpoints.find_newest(run.run_folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000003"
    assert damaged == []
    assert [path.name for path in (run.run_folder / "checkpoints").glob(".*")] == [], "nothing half-written is left"


def test_a_disk_without_room_for_a_line_of_the_log_ends_the_run_with_a_message(
    small_disk: Path, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(small_disk, data, steps=40, checkpoints={"every_steps": 2, "keep_last": 1})
    before_step(monkeypatch, 4, lambda: fill(small_disk, left_bytes=0))
    with pytest.raises(RunError, match=r"\.jsonl: cannot be written: .*; make room"):
        train.train(run, MESH)
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    assert train.train(run, MESH, stop_after=6).step == 6
    assert [record["step"] for record in read_json_lines(run.run_folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_minutes_are_over_stops_behind_a_checkpoint_and_goes_on(tmp_path: Path, data: tuple[Path, Path]) -> None:
    once, timed = make(tmp_path, data, name="once"), make(tmp_path, data, name="timed", checkpoints={"every_steps": 100})
    train.train(once, MESH)
    for step in (1, 2):
        assert train.train(timed, MESH, stop_after_minutes=0.0) == train.Outcome("stopped", step)
    assert train.train(timed, MESH, stop_after_minutes=60.0) == train.Outcome("finished", 6)
    assert same(once, timed)
