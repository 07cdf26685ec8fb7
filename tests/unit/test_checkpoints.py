"""Checkpoints on disk: whole or not there, damage is always noticed, and what is kept is what was asked for."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from clipscale import checkpoints
from clipscale.checkpoints.files import safetensors_pieces
from clipscale.checkpoints.retention import kept, remove_others
from clipscale.checkpoints.settings import Checkpoints
from clipscale.checkpoints.snapshot import Snapshot
from clipscale.errors import CheckpointError

TENSORS = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"a.weight/exp_avg": torch.ones(2, 3)}}


def write(folder: Path, step: int, *, loss: float = 1.0) -> Path:
    """A small checkpoint."""
    return checkpoints.save(folder, step=step, tensors=TENSORS, state={"data": {"k": "hash"}, "loss": loss}, config="name: x\n")


def rewrite_manifest(folder: Path, change: dict[str, Any]) -> None:
    """Put entries into a manifest, as one who knows its form would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoints.load(write(tmp_path, 7))
    assert loaded.step == 7
    assert loaded.state["data"] == {"k": "hash"}
    assert torch.equal(loaded.tensors["model"]["a.weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded.tensors["optimizer"]["a.weight/exp_avg"], torch.ones(2, 3))


def test_our_safetensors_files_are_the_librarys_byte_for_byte() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {f'{dtype}/ä"{n}': (9 * torch.rand(n, 3, generator=draw)).to(dtype) for n, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "transposed": torch.arange(6.0).reshape(2, 3).T, "A": torch.ones(1), "none": torch.ones(0, 2)}
    ours = b"".join(safetensors_pieces(tensors))
    assert ours == safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert int.from_bytes(ours[:8], "little") % 8 == 0, "tensors begin where their numbers can be read in place"
    with pytest.raises(CheckpointError, match=r"types: odd \(torch.complex64\)"):
        safetensors_pieces({"odd": torch.ones(1, dtype=torch.complex64)})


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def test_the_manifest_lists_the_true_sums_of_all_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in manifest.items())
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())


def test_checkpoints_of_the_same_state_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 5), write(tmp_path / "b", 5)
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [path.read_bytes() for path in sorted(second.iterdir())]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o644, 0o755)])
def test_nobody_else_may_write_a_checkpoint_whatever_the_umask(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = write(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {file_mode}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {folder_mode}


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint that is whole; a test that changes files puts them back."""
    return write(tmp_path / "whole", 1)


def flip(path: Path, place: int, bit: int) -> None:
    """Flip bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def test_each_of_a_thousand_flipped_bits_is_found_and_its_file_named(whole: Path) -> None:
    files = sorted(whole.iterdir())
    for seed in range(1000):
        chance = random.Random(seed)
        file = files[seed % len(files)]
        place, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
        flip(file, place, bit)
        problem = checkpoints.verify(whole)
        assert problem is not None, f"seed {seed}: a flip in {file.name} went unseen"
        assert file.name in problem or file.name == "manifest.json"
        flip(file, place, bit)
    assert checkpoints.verify(whole) is None


def test_each_of_a_hundred_truncations_is_found_and_its_file_named(whole: Path) -> None:
    files = sorted(whole.iterdir())
    for seed in range(100):
        file = files[seed % len(files)]
        content = file.read_bytes()
        file.write_bytes(content[: random.Random(seed).randrange(len(content))])
        problem = checkpoints.verify(whole)
        assert problem is not None, f"seed {seed}: {file.name} cut off went unseen"
        assert file.name in problem or file.name == "manifest.json"
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_a_missing_file_is_found_and_named(whole: Path, name: str) -> None:
    (whole / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoints.load(whole)


def test_swapped_files_and_renamed_checkpoints_are_found(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    shutil.copy(first / "state.json", second / "state.json")
    assert "state.json is damaged" in str(checkpoints.verify(second))
    inside = write(tmp_path / "inside", 1)
    (inside / "model.safetensors").rename(inside / "aside")
    (inside / "optimizer.safetensors").rename(inside / "model.safetensors")
    (inside / "aside").rename(inside / "optimizer.safetensors")
    assert "model.safetensors" in str(checkpoints.verify(inside))
    first.rename(tmp_path / "step-00000009")
    assert checkpoints.verify(tmp_path / "step-00000009") == "it is the checkpoint of step 1 under another's name"


def test_a_file_that_the_manifest_does_not_list_is_not_read(whole: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, whole / "average.safetensors")
    assert checkpoints.verify(whole) == "the manifest does not list average.safetensors"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".", "a/b", "", ".hidden", "a\\b", "a\0b"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(whole: Path, name: str) -> None:
    outside = whole.parent / "outside"
    outside.write_text("secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    rewrite_manifest(whole, {name: entry})
    assert "which is no file of this folder" in str(checkpoints.verify(whole))


def test_a_manifest_that_lists_no_weights_is_refused(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    del manifest["model.safetensors"]
    (whole / "manifest.json").write_text(json.dumps(manifest))
    assert "does not list model.safetensors" in str(checkpoints.verify(whole))


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(whole: Path) -> None:
    (whole / "state.json").unlink()
    os.mkfifo(whole / "state.json")
    assert checkpoints.verify(whole) == "state.json is no file"


def test_the_newest_whole_checkpoint_is_found_past_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path, 1)
    second, third, fourth = (write(tmp_path, step) for step in (2, 3, 4))
    (third / "model.safetensors").write_bytes(b"")
    (fourth / "manifest.json").unlink()
    (tmp_path / ".step-00000005.partial").mkdir()
    newest, damaged = checkpoints.find_newest(tmp_path)
    assert newest == second
    assert [line.partition(":")[0] for line in damaged] == [str(fourth), str(third)]


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room_bytes", [0, 100, 200, 600])
def test_a_save_without_room_says_so_and_leaves_the_earlier_checkpoint_whole(tmp_path: Path, room_bytes: int) -> None:
    first = write(tmp_path, 1)
    large = {"model": {"a.weight": torch.ones(1000)}, "optimizer": {}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*earlier checkpoints are untouched"):
            checkpoints.save(tmp_path, step=2, tensors=large, state={}, config="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert checkpoints.verify(first) is None


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_last_the_best_and_every_nth_are_kept() -> None:
    losses = {10: 0.1, 20: 0.9, 30: 0.3, 40: 0.3, 50: 0.7, 60: float("nan"), 70: 0.8}
    assert kept(losses, Checkpoints(keep_last=2), newest=70) == {60, 70}
    assert kept(losses, Checkpoints(keep_last=1, keep_best=2), newest=70) == {70, 10, 40}, "of two equal losses the later"
    assert kept(losses, Checkpoints(keep_last=1, keep_every=20), newest=70) == {70, 20, 40, 60}
    assert kept(losses, Checkpoints(keep_last=1, keep_best=99), newest=70) == {*losses} - {60}


def test_what_lies_beyond_the_newest_is_kept_and_takes_nobodys_place() -> None:
    """A run that fell back past a damaged step 40 saves 30: were 40 counted, keep_last 1 would remove the only whole one."""
    assert kept({20: 1.0, 30: 1.0, 40: 1.0}, Checkpoints(keep_last=1), newest=30) == {30, 40}


def test_others_are_removed_with_the_leftovers_of_killed_saves(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, loss=abs(step - 2))
    for leftover in (".step-00000009.partial", ".step-00000001.removed", ".step-00000003.fetched"):
        (tmp_path / leftover).mkdir()
    (tmp_path / "notes").touch()
    remove_others(tmp_path, Checkpoints(keep_last=2, keep_best=1), newest=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000004", "step-00000005"]


# --- the copy that training waits for --------------------------------------------------------------------------------


def test_a_snapshot_keeps_what_later_steps_change() -> None:
    tensors = {"model": {"w": torch.arange(5.0), "n": torch.tensor(3)}, "optimizer": {"w/m": torch.ones(2, 3).T, "none": torch.ones(0, 2)}}
    snapshot = Snapshot(0, pinned=False)
    copy = snapshot.take(tensors)
    for named in tensors.values():
        for tensor in named.values():
            tensor.zero_()
    assert copy["model"]["w"].tolist() == [0, 1, 2, 3, 4]
    assert copy["model"]["n"].item() == 3
    assert (copy["optimizer"]["w/m"].shape, copy["optimizer"]["none"].shape) == ((3, 2), (0, 2))
    assert copy["optimizer"]["w/m"].sum() == 6


def test_a_snapshot_holds_one_states_bytes_and_uses_them_again() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2).requires_grad_(False))
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {f"{name}/{field}": torch.ones_like(value) for name, value in trains.items() for field in ("exp_avg", "exp_avg_sq")}
    moments |= {f"{name}/step": torch.tensor(1.0) for name in trains}
    tensors = {"model": dict(model.state_dict()), "optimizer": moments}
    expected = checkpoints.expected_bytes(model, averaged=False)
    snapshot = Snapshot(expected, pinned=False)
    first, second = snapshot.take(tensors), snapshot.take(tensors)
    assert first["model"]["0.weight"].data_ptr() == second["model"]["0.weight"].data_ptr()
    assert snapshot.bytes == expected, "what was asked for in advance is what is needed"
    count = sum(len(named) for named in tensors.values())
    own = sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())
    assert own <= snapshot.bytes < own + 64 * count
    snapshot.take({"model": {"large": torch.ones(10_000)}})
    assert snapshot.bytes == 40_000
