"""Files that a run leaves have the modes that the user's umask gives, and none can be run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tiny import tiny_run, write_squares

from clipscale import train
from clipscale.config import Run, validate
from clipscale.parallel.mesh import Mesh
from clipscale.report import write_report


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o027, 0o640, 0o750)], ids=oct)
def test_what_a_run_and_a_build_write_has_the_modes_that_the_umask_gives(umask: int, files: int, folders: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        squares = write_squares(tmp_path / "data", samples=24)
        run = validate(Run, tiny_run(tmp_path / "runs", squares, steps=2))
        train.train(run, Mesh.single())
        write_report(run.run_folder)
    finally:
        os.umask(before)
    written = [*run.run_folder.rglob("*"), run.run_folder, *squares.rglob("*"), squares]
    modes = {str(path.relative_to(tmp_path)): (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in written}
    assert any(name.endswith("model.safetensors") for name in modes)
    assert any(name.endswith(".tar") for name in modes)
    assert not {name: oct(mode) for name, (is_folder, mode) in modes.items() if mode != (folders if is_folder else files)}
