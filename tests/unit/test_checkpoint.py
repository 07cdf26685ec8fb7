"""Checkpoints: whole or not there, and damage is always noticed."""

from __future__ import annotations

import hashlib
import json
import random
import resource
from pathlib import Path

import pytest
import torch

from clipscale import checkpoint
from clipscale.errors import CheckpointError

TENSORS = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"a.weight/exp_avg": torch.ones(2, 3)}}


def write(folder: Path, step: int) -> Path:
    """A small checkpoint."""
    return checkpoint.save(folder, step=step, tensors=TENSORS, state={"data": {"k": "hash"}}, config="name: x\n")


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoint.load(write(tmp_path, 7))
    assert loaded.step == 7
    assert loaded.state["data"] == {"k": "hash"}
    assert torch.equal(loaded.tensors["model"]["a.weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded.tensors["optimizer"]["a.weight/exp_avg"], torch.ones(2, 3))


def test_the_manifest_lists_the_true_sums_of_all_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in manifest.items())


@pytest.mark.parametrize("seed", range(40))
def test_every_flipped_bit_in_any_file_is_detected(tmp_path: Path, seed: int) -> None:
    folder = write(tmp_path, 1)
    chance = random.Random(seed)
    file = chance.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    if checkpoint.verify(folder) is None:  # only a flip in manifest.json's white space may go unseen: it changes nothing
        assert file.name == "manifest.json"
        whole = write(tmp_path / "again", 1)
        assert json.loads(bytes(content)) == json.loads((whole / "manifest.json").read_text())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_truncated_or_missing_files_are_detected_and_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, the manifest says|not a whole checkpoint"):
        checkpoint.load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


def test_the_newest_whole_checkpoint_is_found_past_a_damaged_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    second, third = write(tmp_path, 2), write(tmp_path, 3)
    (third / "model.safetensors").write_bytes(b"")
    (tmp_path / ".step-00000004.partial").mkdir()
    newest, damaged = checkpoint.find_newest(tmp_path)
    assert newest == second
    assert len(damaged) == 1
    assert str(third) in damaged[0]


def test_only_the_newest_are_kept_and_leftovers_of_killed_saves_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / ".step-00000009.partial").mkdir()
    checkpoint.remove_old(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("room_bytes", [0, 100, 200, 600])
def test_a_save_without_room_says_so_and_leaves_the_earlier_checkpoint_whole(tmp_path: Path, room_bytes: int) -> None:
    first = write(tmp_path, 1)
    large = {"model": {"a.weight": torch.ones(1000)}, "optimizer": {}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*earlier checkpoints are untouched"):
            checkpoint.save(tmp_path, step=2, tensors=large, state={}, config="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert checkpoint.verify(first) is None


def test_checkpoints_of_the_same_state_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 5), write(tmp_path / "b", 5)
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [path.read_bytes() for path in sorted(second.iterdir())]
