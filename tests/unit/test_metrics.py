"""Where numbers go: lines that survive a kill, and files a resumed run continues as if it had never stopped."""

from __future__ import annotations

import importlib.util
import json
import resource
from pathlib import Path

import pytest

from clipscale.errors import MissingPackage, RunError
from clipscale.metrics import JsonLines, Logging, check_packages, flatten, open_loggers, read_json_lines


def write(path: Path, steps: range) -> None:
    """Lines of these steps, continued after the first of them."""
    lines = JsonLines(path, keep_through_step=steps.start - 1)
    for step in steps:
        lines.write({"step": step, "loss": step / 7})
    lines.close()


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "once.jsonl", range(1, 11))
    write(tmp_path / "twice.jsonl", range(1, 8))
    write(tmp_path / "twice.jsonl", range(5, 11))  # the checkpoint was at step 4
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "once.jsonl").read_bytes()


def test_a_last_line_cut_short_by_a_kill_is_left_out_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4))
    path.write_text(path.read_text()[:-5])
    assert [record["step"] for record in read_json_lines(path)] == [1, 2]
    write(path, range(3, 5))
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3, 4]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl", keep_through_step=0)
    lines.write({"step": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    lines.close()


def test_flatten_keeps_numbers_and_drops_the_rest() -> None:
    assert flatten({"loss": 1.5, "kinds": {"a": {"scale": 2}}, "name": "x", "flag": True}) == {"loss": 1.5, "kinds/a/scale": 2}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here, so its absence cannot be shown")
def test_a_logger_without_its_package_is_refused_with_the_install_line() -> None:
    with pytest.raises(MissingPackage, match="pip install wandb"):
        check_packages(Logging(wandb_project="x"))
    check_packages(Logging(tensorboard=True))


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = open_loggers(Logging(tensorboard=True), name="x", folder=tmp_path, settings={}, first_step=1)
    for step in (1, 2):
        logger.write(step, {"loss": step * 0.5})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert json.dumps(events.Tags()["scalars"]) == '["loss"]'


def test_a_line_that_the_disk_takes_in_part_is_an_error_and_cut_off_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path, keep_through_step=0)
    file.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, hard))
    try:
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: .*; make room"):
            file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.close()
    assert path.read_bytes() == b'{"step": 1}\n{"s'
    JsonLines(path, keep_through_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n'
