"""The training command as people run it: launched, killed, told to stop, asked for the impossible."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_run, write_squares, write_tones

from clipscale.cli import main
from clipscale.metrics import read_json_lines

TORCHRUN = Path(__file__).parents[2] / "launch" / "torchrun.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Squares and tones."""
    folder = tmp_path_factory.mktemp("data")
    return write_squares(folder, samples=48), write_tones(folder, samples=24)


@pytest.fixture
def config(tmp_path: Path, data: tuple[Path, Path]) -> Callable[..., Path]:
    """Writes a configuration file of a tiny ddp run in tmp_path/runs."""

    def write(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_run(tmp_path / "runs", *data, name=name, engine="ddp", **changes)))
        return path

    return write


def clipscale(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command's exit code and output, run in this process: importing torch anew each time would take seconds."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["clipscale", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


def start_ranks(config: Path, **environment: str) -> subprocess.Popen[str]:
    """Training on two ranks, in a process group of its own."""
    return subprocess.Popen(
        [str(TORCHRUN), "train", str(config)], text=True, stderr=subprocess.PIPE, env={**ENVIRONMENT, **environment}, start_new_session=True
    )


def processes_of(config: Path, *, below: int | None = None) -> list[int]:
    """Every process that trains by a configuration: launchers, ranks and their data workers; or only the ranks of a launcher."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            own = str(config).encode() in (process / "cmdline").read_bytes()
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # no process, or gone meanwhile
            continue
        if own and below in (None, parent):
            found.append(int(process.name))
    return sorted(found)


def wait_for_step(run: Path, step: int) -> None:
    """Until metrics.jsonl holds the step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        steps = read_json_lines(run / "metrics.jsonl")
        if steps and steps[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {step}")


def test_killed_runs_and_terminated_runs_end_as_the_run_nobody_touched(tmp_path: Path, config: Callable[..., Path]) -> None:
    once, hurt = config("once", steps=70, workers=1), config("hurt", steps=70, workers=1)
    done = start_ranks(once)
    assert done.wait(timeout=300) == 0, done.stderr and done.stderr.read()

    killed = start_ranks(hurt)
    wait_for_step(tmp_path / "runs" / "hurt", 9)
    os.kill(killed.pid, signal.SIGKILL)  # the launcher alone: neither its ranks nor their data workers may live on
    killed.wait()
    time.sleep(2)
    assert not processes_of(hurt)

    told = start_ranks(hurt, MAX_RESTARTS="2")
    wait_for_step(tmp_path / "runs" / "hurt", 20)
    for process in processes_of(hurt, below=told.pid):
        os.kill(process, signal.SIGUSR2)  # a wish to end, and nothing to restart ranks for
    assert told.wait(timeout=120) == 128 + signal.SIGUSR2
    last = read_json_lines(tmp_path / "runs" / "hurt" / "events.jsonl")[-1]
    assert last["event"] == "stopped"
    assert f"step-{last['step']:08d}" in {path.name for path in (tmp_path / "runs" / "hurt" / "checkpoints").iterdir()}

    ended = json.loads((tmp_path / "runs" / "hurt" / "ended.json").read_text())
    assert (ended["how"], ended["step"], ended["signal"]) == ("stopped", last["step"], signal.SIGUSR2)

    finished = start_ranks(hurt, MAX_RESTARTS="2")
    wait_for_step(tmp_path / "runs" / "hurt", last["step"] + 9)
    os.kill(processes_of(hurt, below=finished.pid)[-1], signal.SIGKILL)  # one rank: the launcher starts both again
    assert finished.wait(timeout=300) == 0, finished.stderr and finished.stderr.read()
    assert json.loads((tmp_path / "runs" / "hurt" / "ended.json").read_text())["how"] == "finished"
    resumed = [line for line in read_json_lines(tmp_path / "runs" / "hurt" / "events.jsonl") if line["event"] == "resumed"]
    assert len(resumed) == 3, "after the launcher's death, the signal and the rank's death"
    metrics = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("once", "hurt")]
    assert metrics[0] == metrics[1]
    model = [(tmp_path / "runs" / name / "checkpoints" / "step-00000070" / "model.safetensors").read_bytes() for name in ("once", "hurt")]
    assert model[0] == model[1]
    for process in (done, killed, told, finished):
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: there is no such setting, did you mean 'lr'?"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("pair_kinds.image_text.global_batch=13", "is not a multiple of the 2 ranks; nearest that fit: 12, 14"),
        ("pair_kinds.image_text.sources.squares.url=nowhere", "nowhere"),
        ("pair_kinds.image_text.sources={}", "pair_kinds.image_text.sources"),
        ("engine=local", "set engine: ddp"),
        ("towers.image.recompute={part: attention}", "recompute.part attention: this tower's blocks"),
        ("engine={name: deepspeed}", "with `every` above 1 some steps leave out a tower"),
        ("folder=/proc/x", "cannot be written"),
    ],
)
def test_a_wrong_request_gets_one_message_exit_code_2_and_no_file(
    tmp_path: Path, config: Callable[..., Path], override: str, message: str
) -> None:
    path = config("wrong")
    result = clipscale("train", path, override, "--check", "--ranks", "2")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_launcher_refuses_with_the_same_single_message(tmp_path: Path, config: Callable[..., Path]) -> None:
    result = subprocess.run(
        [str(TORCHRUN), "train", str(config("wrong")), "seeed=1"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "clipscale: 1 mistake in the configuration:",
        *[line for line in result.stderr.splitlines() if "did you mean 'seed'?" in line],
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["a: [", "just words\n", "\0\1"])
def test_unreadable_configurations_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = clipscale("config", path)
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


def test_config_prints_settings_that_read_back_the_same(tmp_path: Path, config: Callable[..., Path]) -> None:
    first = clipscale("config", config("x"), "optimizer.lr=3e-4")
    assert first.returncode == 0, first.stderr
    assert yaml.safe_load(first.stdout)["optimizer"]["lr"] == 3e-4
    (tmp_path / "resolved.yaml").write_text(first.stdout)
    assert clipscale("config", tmp_path / "resolved.yaml").stdout == first.stdout


def test_parts_lists_every_part_with_its_first_line() -> None:
    result = clipscale("parts", "objectives")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert {"clip", "cwcl", "siglip"} <= set(names)
    assert all(len(line.split()) > 3 for line in result.stdout.splitlines())
    wrong = clipscale("parts", "objective")
    assert wrong.returncode == 2
    assert "did you mean 'objectives'?" in wrong.stderr


def test_processes_that_read_shards_beside_torch_end_cleanly(data: tuple[Path, Path]) -> None:
    """Arrow's threads aborted about half of them at the end; six processes miss that once in 64 times."""
    code = f"import torch; from clipscale.data.opening import open_dataset; open_dataset({str(data[0])!r}).read(0, [0])"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(6)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
