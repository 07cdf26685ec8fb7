"""The doctor: what it finds on a sound machine and in sound data, and that it sees what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import clipscale
from tiny import tiny_run, write_squares, write_tones

from clipscale import train
from clipscale.config import Run, validate
from clipscale.doctor import Finding, examine, machine, miniature, ranks
from clipscale.doctor.finding import asked, of_all_ranks, worst
from clipscale.doctor.sources import data as of_sources
from clipscale.errors import DataError
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model

QUICK = ["python", "packages", "gpus", "shared memory", "open files", "disk room"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Squares and tones."""
    folder = tmp_path_factory.mktemp("data")
    return write_squares(folder, samples=48), write_tones(folder, samples=24)


def write_config(folder: Path, data: tuple[Path, Path], **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(folder / "runs", *data, **changes)))
    return path


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_sound_run_is_examined_down_to_its_first_step_and_nothing_is_left(tmp_path: Path, data: tuple[Path, Path]) -> None:
    config = write_config(tmp_path, data, engine="ddp", workers=2, micro_batch=4, lanes=4)
    status, said = clipscale("doctor", config, "--json", tmp_path / "findings.json")
    told = json.loads((tmp_path / "findings.json").read_text())
    names = [check["name"] for check in told["checks"]]
    assert names == [*QUICK, "disk speed", "bandwidth", "clock skew", "model", "source squares", "source tones", "one step"]
    assert {check["name"]: check["state"] for check in told["checks"] if check["state"] == "problem"} == {}
    assert (status, told["state"]) == (0, "ok" if all(check["state"] == "ok" for check in told["checks"]) else "warning")
    assert "3 shards, 48 samples" in said
    assert "2 shards, 24 samples" in said
    assert "losses image_text " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings.json", "run.yaml"]


def test_the_quick_examination_asks_nothing_that_takes_long(tmp_path: Path, data: tuple[Path, Path]) -> None:
    status, said = clipscale("doctor", "--quick")
    assert (status, re.findall(r"^(?:ok|warning) +(\w+(?: \w+)?)  ", said, re.MULTILINE)) == (0, QUICK)
    run = validate(Run, tiny_run(tmp_path, *data))
    found = examine(run, Mesh.single(), quick=True)
    assert [finding.name for finding in found] == [*QUICK, "model", "source squares", "source tones"]


def test_the_first_step_is_that_of_a_training_with_so_few_rows(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = validate(Run, tiny_run(tmp_path, data[0], steps=1))
    with torch.device("meta"):
        shapes = build_model(run)
    said = miniature.one_step(run, Mesh.single(), shapes).found
    settings = tiny_run(tmp_path, data[0], steps=1)
    settings["pair_kinds"]["image_text"]["global_batch"] = 4
    train.train(validate(Run, settings), Mesh.single())
    (line,) = read_json_lines(tmp_path / "tiny" / "metrics.jsonl")
    assert said.endswith(f"image_text {line['loss']:.3f}")


def test_a_model_without_room_is_left_out_with_a_warning(tmp_path: Path, data: tuple[Path, Path]) -> None:
    run = validate(Run, tiny_run(tmp_path, data[0], embed_dim=2**36))  # 4 TiB of projections, as names and shapes only
    with torch.device("meta"):
        shapes = build_model(run)
    found = miniature.one_step(run, Mesh.single(), shapes)
    assert (found.state, "left out: the model needs about" in found.found) == ("warning", True)


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 8), (6, 12), (12, 12)])
def test_a_miniature_batch_is_small_and_shared_out_equally(world: int, expected: int, tmp_path: Path, data: tuple[Path, Path]) -> None:
    small = miniature.miniature(validate(Run, tiny_run(tmp_path, data[0], engine="ddp")), world)
    assert small.pair_kinds["image_text"].global_batch == expected
    small.check_world(world)


def test_data_that_are_not_there_are_a_problem_with_exit_code_1(tmp_path: Path, data: tuple[Path, Path]) -> None:
    status, said = clipscale(
        "doctor", write_config(tmp_path, data), "--quick", f"pair_kinds.image_text.sources.squares.url={tmp_path}/nowhere"
    )
    assert status == 1
    assert "problem  source squares" in said
    assert "there is no such folder" in said


@pytest.mark.parametrize("damage", ["tar", "parquet"])
def test_a_damaged_shard_is_a_problem_that_names_it(damage: str, tmp_path: Path, data: tuple[Path, Path]) -> None:
    squares = Path(shutil.copytree(data[0], tmp_path / "squares"))
    path = squares / f"000002.{damage}"
    bytes_ = bytearray(path.read_bytes())
    place = bytes_.index(b"\x89PNG") + 30 if damage == "tar" else len(bytes_) // 2
    bytes_[place] ^= 1
    path.write_bytes(bytes_)
    run = validate(Run, tiny_run(tmp_path, squares))
    found = by_name(list(examine_data(run)))["source squares"]
    assert found.state == "problem"
    assert "000002" in found.found
    assert "clipscale-shards verify" in found.advice


def examine_data(run: Run) -> list[Finding]:
    """The findings of a run's sources alone, samples included."""
    return of_sources(run, build_model(run).inputs(), quick=False)


def test_tars_without_an_index_are_examined_too(tmp_path: Path, data: tuple[Path, Path]) -> None:
    settings = tiny_run(tmp_path, data[0])
    settings["pair_kinds"]["image_text"]["sources"] = {"plain": {"name": "tars", "url": str(data[0])}}
    (found,) = examine_data(validate(Run, settings))
    assert (found.name, found.state) == ("source plain", "ok")
    assert "3 shards, samples are counted as they are read" in found.found


def test_a_setting_that_the_ranks_cannot_have_is_found(tmp_path: Path, data: tuple[Path, Path]) -> None:
    status, said = clipscale("doctor", write_config(tmp_path, data), "--quick", "towers.text.tokenizer=package:nothing_there")
    assert status == 1
    assert "problem  model" in said
    assert "nothing_there" in said


def test_a_run_that_needs_a_gpu_is_told_that_there_is_none() -> None:
    assert machine.gpus(wanted=False).state == "ok"
    found = machine.gpus(wanted=True)
    assert (found.state, "--gpus all" in found.advice) == ("problem", True)


@pytest.mark.parametrize(("limit", "state"), [(1023, "problem"), (1024, "ok"), (-1, "ok")])
def test_few_open_files_are_a_problem(limit: int, state: str) -> None:
    assert machine.open_files(limit).state == state


@pytest.mark.parametrize(("size", "state"), [(0, "warning"), (64 * 2**20, "warning"), (2**30, "ok")])
def test_shared_memory_of_dockers_default_is_a_warning(size: int, state: str) -> None:
    found = machine.shared_memory(size)
    assert (found.state, "--ipc host" in found.advice) == (state, state == "warning")


def test_a_folder_that_cannot_be_written_is_a_problem() -> None:
    assert machine.room(Path("/proc/nowhere/runs")).state == "problem"


def test_a_folder_that_is_not_there_yet_is_judged_by_what_is_above_it(tmp_path: Path) -> None:
    assert str(tmp_path) in machine.room(tmp_path / "not" / "yet").found
    assert not (tmp_path / "not").exists()


def test_packages_out_of_range_are_named_and_missing_extras_are_not() -> None:
    assert machine.packages().state == "ok"
    requirement = machine.Requirement
    assert "needed: >=99" in machine._version_mistake(requirement("numpy>=99"))
    assert "is not installed" in machine._version_mistake(requirement("surely-not-installed>=1"))
    assert not machine._version_mistake(requirement("surely-not-installed>=1; extra == 's3'"))
    assert machine._version_mistake(requirement("numpy>=99; extra == 's3'"))


@pytest.mark.parametrize(("seconds", "state"), [(0.0, "ok"), (1.0, "ok"), (1.5, "warning")])
def test_clocks_that_lie_apart_are_a_warning(seconds: float, state: str) -> None:
    assert ranks.judge_skew(seconds).state == state


def test_a_check_that_fails_is_a_problem_and_not_the_end() -> None:
    def fails() -> Finding:
        raise DataError("no such thing")

    assert asked("it", fails) == Finding("it", "problem", "DataError: no such thing", "see the message; nothing else was checked here")


def test_findings_of_ranks_become_the_worst_with_its_ranks() -> None:
    good, bad = Finding("a", "ok", "fine"), Finding("a", "problem", "broken", "mend it")
    assert of_all_ranks([good, good]) == good
    assert of_all_ranks([good, bad, bad]) == Finding("a", "problem", "ranks 1, 2: broken", "mend it")
    assert of_all_ranks([Finding("a", "ok", "1 ms"), Finding("a", "ok", "2 ms")]) == Finding("a", "ok", "1 ms (rank 0 of 2)")
    assert (worst([]), worst([good, Finding("b", "warning", "")]), worst([bad, good])) == ("ok", "warning", "problem")
    assert worst([Finding("b", "warning", ""), bad]) == worst([bad, Finding("b", "warning", "")]) == "problem"
