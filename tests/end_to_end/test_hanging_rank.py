"""A rank that hangs: named with its stack, ended, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import tiny_run, write_squares

from clipscale.metrics import read_json_lines

TORCHRUN = Path(__file__).parents[2] / "launch" / "torchrun.sh"
HANG_S = 4.0


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares."""
    return write_squares(tmp_path_factory.mktemp("data"), samples=48)


def start(folder: Path, squares: Path, name: str) -> subprocess.Popen[str]:
    """A hundred and twenty steps on two ranks; a rank that died is started again once."""
    path = folder / f"{name}.yaml"
    watch = {"hang_s": HANG_S, "straggler_factor": None}
    path.write_text(
        yaml.safe_dump(tiny_run(folder / "runs", squares, name=name, engine="ddp", steps=120, checkpoints={"every_steps": 10}, watch=watch))
    )
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "1"}
    return subprocess.Popen([str(TORCHRUN), "train", str(path)], text=True, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def rank_process(launcher: int, rank: int) -> int:
    """The process that the launcher started as this rank."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                return int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    raise AssertionError(f"process {launcher} has no rank {rank}")


def test_a_stopped_rank_is_named_with_its_stack_and_the_restarted_run_is_the_run_nobody_stopped(tmp_path: Path, squares: Path) -> None:
    once = start(tmp_path, squares, "once")
    run = tmp_path / "runs" / "hurt"
    assert once.wait(timeout=300) == 0, once.stderr and once.stderr.read()
    hurt = start(tmp_path, squares, "hurt")
    deadline = time.monotonic() + 200
    while len(read_json_lines(run / "metrics.jsonl")) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped = rank_process(hurt.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    assert hurt.wait(timeout=300) == 0, hurt.stderr and hurt.stderr.read()
    assert hurt.stderr is not None
    said = hurt.stderr.read()
    (told,) = (run / "hangs").iterdir()
    text = told.read_text()
    assert text.splitlines()[0].startswith(f"no rank got further for {HANG_S:.0f} s: rank 1 (process {stopped} on ")
    assert "it is stopped (SIGSTOP); last seen in phase " in text
    assert text in said
    for rank in (0, 1):
        assert "in run_to" in text.partition(f"=== rank {rank} ")[2].partition("=== ")[0], "the training loop stands in both stacks"
    metrics = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("once", "hurt")]
    assert metrics[0] == metrics[1]
    events = [event["event"] for event in read_json_lines(run / "events.jsonl")]
    assert "resumed" in events
    for process in (once, hurt):
        assert process.stderr is not None
        process.stderr.close()
