"""The keeper: checkpoints are taken when they are due or asked for, while training goes on, and go to the store and come back from it."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from clipscale import checkpoints
from clipscale.checkpoints.keeper import FAILED, NOTHING, WANTED, Keeper
from clipscale.checkpoints.store import CheckpointStore
from clipscale.config import validate
from clipscale.errors import CheckpointError, ConfigError, DataError, RequestError, RunFolderError
from clipscale.parallel.mesh import Mesh


class Unreliable(MemoryFileSystem):
    """A store in memory that refuses as often as it is told to; what it holds is its own."""

    protocol = "unreliable"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    refusals = 0
    order: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("unreliable:/")))

    def put_file(self, lpath: str, rpath: str, *more: Any, **options: Any) -> None:
        """As fsspec's, unless it refuses."""
        if Unreliable.refusals:
            Unreliable.refusals -= 1
            raise OSError("503 slow down")
        Unreliable.order.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, *more, **options)


@pytest.fixture
def address() -> Iterator[str]:
    """An empty store's address."""
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    yield "unreliable://bucket/runs/x"
    Unreliable.store.clear()
    Unreliable.pseudo_dirs[:] = [""]
    Unreliable.refusals = 0
    Unreliable.order.clear()


class Training:
    """Stands for a run: one number that every step adds one to."""

    def __init__(self, folder: Path, *, store: str | None = None, **settings: Any) -> None:
        self.weight, self.events = torch.zeros(1000), list[tuple[str, int]]()
        self.keeper = Keeper(
            checkpoints.Checkpoints(**settings),
            Mesh.single(),
            run_folder=folder,
            store=None if store is None else CheckpointStore(store),
            expected_bytes=4096,
            tell=lambda event, *, step, detail: self.events.append((event, step)),  # noqa: ARG005
        )

    def save(self, step: int, *, wait: bool = True) -> None:
        """Take a checkpoint of this step."""
        tensors = {"model": {"w": self.weight}, "optimizer": dict[str, torch.Tensor]()}
        self.keeper.save(step, tensors=lambda: tensors, state={"seed": 0}, config="name: x\n", wait=wait)

    def steps(self, first: int, last: int, *, losses: Callable[[int], float] = float) -> list[int]:
        """Take these steps, and checkpoints where they are due; returns where they were."""
        due = []
        for step in range(first, last + 1):
            self.weight += 1
            if self.keeper.due(step, news=self.keeper.news(), loss=losses(step)):
                self.save(step, wait=False)
                due.append(step)
        self.keeper.finish()
        return due


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk on which nothing is synchronised until the event is set."""
    free = threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        assert free.wait(60)
        fsync(descriptor)

    monkeypatch.setattr("clipscale.checkpoints.files.os.fsync", slow)
    yield free
    free.set()


def saved(folder: Path, step: int) -> torch.Tensor:
    """The weight in a checkpoint."""
    return checkpoints.load(folder / "checkpoints" / f"step-{step:08d}").tensors["model"]["w"]


def names(folder: Path) -> list[int]:
    """Steps that have a checkpoint."""
    return sorted(int(path.name[5:]) for path in checkpoints.list_checkpoints(folder))


# --- when ------------------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path: Path, disk: threading.Event) -> None:
    training = Training(tmp_path)
    training.save(1, wait=False)
    training.weight += 100
    assert training.keeper.news() == NOTHING
    assert training.events == [], "it is not whole yet"
    assert names(tmp_path / "checkpoints") == []
    disk.set()
    training.keeper.finish()
    assert training.events == [("checkpoint", 1)]
    assert saved(tmp_path, 1).eq(0).all()


def test_there_is_one_save_at_a_time_and_the_next_waits_for_it(tmp_path: Path, disk: threading.Event) -> None:
    training = Training(tmp_path)
    training.save(1, wait=False)
    training.weight += 1
    second = threading.Thread(target=training.save, args=(2,))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "the first is still being written"
    disk.set()
    second.join(60)
    assert [float(saved(tmp_path, step)[0]) for step in (1, 2)] == [0, 1]
    assert training.events == [("checkpoint", 1), ("checkpoint", 2)]


def test_checkpoints_are_due_by_steps_and_not_otherwise(tmp_path: Path) -> None:
    assert Training(tmp_path, every_steps=3).steps(1, 8) == [3, 6]


def test_checkpoints_are_due_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("clipscale.checkpoints.keeper.time.monotonic", lambda: clock[0])
    training = Training(tmp_path, every_steps=None, every_minutes=2.0)
    assert training.keeper.news() == NOTHING
    clock[0] += 119
    assert training.keeper.news() == NOTHING
    clock[0] += 1
    assert training.steps(1, 2) == [1], "and two minutes begin anew"


def test_settings_that_would_never_save_are_refused() -> None:
    with pytest.raises(ConfigError, match="a killed run would begin anew"):
        validate(checkpoints.Checkpoints, {"every_steps": None})


def test_a_file_asks_for_one_checkpoint_after_the_next_step(tmp_path: Path) -> None:
    training = Training(tmp_path)
    assert training.keeper.news() == NOTHING
    (tmp_path / "save").touch()
    assert training.keeper.news() == WANTED
    assert training.steps(1, 3) == [1]
    assert not (tmp_path / "save").exists()
    (tmp_path / "save").touch()
    training.save(7)  # due anyway: one is enough
    assert training.keeper.news() == NOTHING


# --- failures --------------------------------------------------------------------------------------------------------


def test_failing_saves_are_told_and_end_the_run_when_there_are_too_many_in_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path, every_steps=1, failures_allowed=1)
    folder = tmp_path / "checkpoints"
    training.save(1)
    folder.rename(tmp_path / "aside")
    folder.touch()  # a file where the folder should be
    training.save(2, wait=False)
    assert training.keeper._writing is not None
    assert training.keeper._writing[1].exception() is not None
    assert training.keeper.news() == NOTHING, "one may fail"
    assert "checkpoint of step 2" in capsys.readouterr().err
    folder.unlink()
    training.save(3)
    folder.rename(tmp_path / "aside3")
    folder.touch()
    training.save(4, wait=False)
    training.keeper.close()
    assert training.keeper.news() == NOTHING, "one in a row, for the third was whole"
    training = Training(tmp_path, every_steps=1, failures_allowed=0)
    training.save(5, wait=False)
    training.keeper.close()
    assert training.keeper.news() == FAILED
    with pytest.raises(CheckpointError, match="step-00000005: could not be written"):
        training.keeper.due(6, news=FAILED, loss=0.0)
    assert checkpoints.verify(tmp_path / "aside3" / "step-00000003") is None


def test_a_save_that_is_waited_for_may_not_fail(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        Training(tmp_path, failures_allowed=5).save(1)


def test_what_ends_a_run_lets_the_save_under_way_become_whole(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(1, wait=False)
    training.keeper.close()
    assert checkpoints.verify(tmp_path / "checkpoints" / "step-00000001") is None


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_best_are_those_of_the_lowest_mean_loss_since_the_checkpoint_before(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=2, keep_last=1, keep_best=1)
    curve = [17.0, 1.0, 2.0, 4.0, 7.0, 1.0, 5.0, 5.0]  # means 9, 3, 4, 5; from the beginning 9, 6, 5.3, 5.25; last steps 1, 4, 1, 5
    training.steps(1, 8, losses=lambda step: curve[step - 1])
    assert names(tmp_path / "checkpoints") == [4, 8]


# --- store -----------------------------------------------------------------------------------------------------------


def test_checkpoints_are_copied_manifest_last_and_removed_as_they_are_here(tmp_path: Path, address: str) -> None:
    training = Training(tmp_path, store=address, every_steps=1, keep_last=1, keep_every=2)
    training.steps(1, 3)
    assert Unreliable.order[:5] == ["config.yaml", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert CheckpointStore(address).names() == ["step-00000003", "step-00000002"]
    assert names(tmp_path / "checkpoints") == [2, 3]
    back = CheckpointStore(address).fetch("step-00000002", tmp_path / "back")
    there = tmp_path / "checkpoints" / "step-00000002"
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {path.name: path.read_bytes() for path in there.iterdir()}
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o022 for path in (back, *back.iterdir()))


def test_a_run_on_an_empty_folder_goes_on_from_the_newest_whole_checkpoint_of_the_store(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Training(tmp_path / "a", store=address, every_steps=1).steps(1, 3)
    Unreliable.store["/bucket/runs/x/step-00000003/model.safetensors"].getbuffer()[20] ^= 1
    asked: list[str] = []
    elsewhere = Training(tmp_path / "b", store=address)
    assert elsewhere.keeper.newest(check=lambda text, *, where: asked.append(text)) == "step-00000002"  # noqa: ARG005
    assert asked == ["name: x\n"]
    assert float(saved(tmp_path / "b", 2)[0]) == 2
    assert "unreliable://bucket/runs/x/step-00000003: model.safetensors is damaged" in capsys.readouterr().err
    assert names(tmp_path / "b" / "checkpoints") == [2], "nothing half-fetched is left"


def test_what_is_newer_here_is_not_fetched(tmp_path: Path, address: str) -> None:
    Training(tmp_path, store=address, every_steps=1).steps(1, 2)
    Training(tmp_path, every_steps=1).steps(3, 3)
    assert Training(tmp_path, store=address).keeper.newest(check=lambda *_, **__: None) == "step-00000003"


def test_a_failing_store_is_a_failed_save_whose_checkpoint_here_is_whole(tmp_path: Path, address: str) -> None:
    training = Training(tmp_path, store=address)
    Unreliable.refusals = 1
    with pytest.raises(CheckpointError, match=r"is whole, but could not be copied to unreliable://.*503 slow down"):
        training.save(1)
    assert checkpoints.verify(tmp_path / "checkpoints" / "step-00000001") is None
    training.save(2)
    assert CheckpointStore(address).names()[0] == "step-00000002"
    assert training.events == [("checkpoint_failed", 1), ("checkpoint", 2)]


def test_a_store_that_does_not_answer_stops_a_run_that_has_nothing_else(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Training(tmp_path / "here")
    here.save(1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 forbidden")

    monkeypatch.setattr(Unreliable, "ls", refuse)
    with pytest.raises(CheckpointError, match=r"does not say which checkpoints it holds: OSError: 403 forbidden"):
        Training(tmp_path / "empty", store=address).keeper.newest(check=lambda *_, **__: None)
    assert Training(tmp_path / "here", store=address).keeper.newest(check=lambda *_, **__: None) == "step-00000001"
    assert "going on from" in capsys.readouterr().err


def test_a_stores_manifest_cannot_name_files_outside_the_folder(tmp_path: Path, address: str) -> None:
    Training(tmp_path / "a", store=address).save(1)
    manifest = Unreliable.store["/bucket/runs/x/step-00000001/manifest.json"]
    entries = json.loads(manifest.getvalue())
    manifest.seek(0)
    manifest.write(json.dumps({**entries, "../outside": entries["config.yaml"]}).encode())
    with pytest.raises(CheckpointError, match=r"names '\.\./outside', which is no file of this folder"):
        CheckpointStore(address).fetch("step-00000001", tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("store", "error", "message"),
    [
        ("pipe:cat", DataError, "run shell commands"),
        ("nosuch://x", DataError, "nosuch"),
        ("https://example.org/x", RequestError, "nothing can be written there"),
    ],
)
def test_addresses_that_can_be_no_store_are_refused_before_a_run_starts(store: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checkpoints.check_store(store)


def test_a_checkpoint_is_opened_by_its_runs_or_its_own_address_here_or_in_a_store(tmp_path: Path, address: str) -> None:
    Training(tmp_path, store=address, every_steps=1).steps(1, 3)
    fsspec.filesystem("unreliable").rm_file("/bucket/runs/x/step-00000003/manifest.json")  # a copy that was killed
    for place, step in (
        (tmp_path, 3),
        (tmp_path / "checkpoints", 3),
        (tmp_path / "checkpoints" / "step-00000001", 1),
        (address, 2),
        (f"{address}/", 2),
        (f"{address}/step-00000001", 1),
    ):
        with checkpoints.Opening() as opening, checkpoints.Opening() as of_another_rank:
            found = opening.find(place)
            assert (opening.load(found).step, of_another_rank.load(found).step) == (step, step)
            copies = [of_another_rank._copies.name] if of_another_rank._copies else []
        assert not any(Path(copy).exists() for copy in copies)
    for nothing in (tmp_path / "nowhere", "unreliable://bucket/nothing"):
        with checkpoints.Opening() as opening, pytest.raises(RunFolderError, match="neither a run folder with a whole checkpoint"):
            opening.find(nothing)


def test_an_ordinary_folder_can_be_the_store(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", store=str(tmp_path / "disk" / "x"), every_steps=1, keep_last=1)
    training.steps(1, 2)
    assert names(tmp_path / "disk" / "x") == [2]
    assert Training(tmp_path / "other", store=str(tmp_path / "disk" / "x")).keeper.newest(check=lambda *_, **__: None) == "step-00000002"
    with checkpoints.Opening() as opening:
        assert opening.find(tmp_path / "disk" / "x").endswith("disk/x/step-00000002")
