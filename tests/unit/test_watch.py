"""Whom the watch names: stragglers, ranks that hang, holders of a run folder; on made-up ranks and real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from clipscale.errors import RunFolderError
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.phases.clocks import HostClock
from clipscale.watch.heartbeat import Heartbeat, started, take
from clipscale.watch.lease import Lease
from clipscale.watch.stragglers import Stragglers
from clipscale.watch.verdict import judge, report
from clipscale.watch.watchdog import Watchdog

# --- stragglers ------------------------------------------------------------------------------------------------


def step_seconds(*, steps: int, ranks: int) -> np.ndarray:
    """Steps of a fifth of a second that vary by a tenth, one in fifty of them three times as long: [steps, ranks]."""
    chance = np.random.default_rng(0)
    seconds = 0.2 * chance.lognormal(0.0, 0.1, (steps, ranks))
    return seconds * np.where(chance.random((steps, ranks)) < 0.02, 3.0, 1.0)


def test_a_rank_slowed_by_30_percent_is_named_within_50_steps_and_once() -> None:
    seconds = step_seconds(steps=400, ranks=8)
    seconds[100:, 5] *= 1.3
    stragglers = Stragglers(1.2, world=8)
    named = {step: found for step, row in enumerate(seconds) if (found := stragglers.step(row.tolist()))}
    assert len(named) == 1
    ((step, (sentence,)),) = named.items()
    assert 100 < step <= 150
    assert sentence.startswith("rank 5 takes ")


def test_no_rank_is_named_in_10_000_steps_of_equal_ranks() -> None:
    stragglers = Stragglers(1.2, world=8)
    assert not [found for row in step_seconds(steps=10_000, ranks=8) for found in stragglers.step(row.tolist())]


def test_one_of_two_ranks_is_named_and_named_again_after_it_had_recovered() -> None:
    stragglers = Stragglers(1.2, world=2)
    slow_in = [*range(50), *range(150, 200)]
    named = [step for step in range(250) for _ in stragglers.step([0.1, 0.2 if step in slow_in else 0.1])]
    assert len(named) == 2
    assert 150 <= named[1] < 200


def test_a_millisecond_makes_no_straggler() -> None:
    stragglers = Stragglers(1.2, world=2)
    assert not [found for _ in range(100) for found in stragglers.step([0.001, 0.0025])]


# --- who is to blame for a hang --------------------------------------------------------------------------------

BEAT = Heartbeat(
    rank=0, host="here", pid=1, started=5, step=7, marks=12, phase="contrast", main_stack=['  File "/x/torch/dist.py", line 3\n']
)


def ranks_at(*progress: tuple[int, int], outside: tuple[int, ...] = ()) -> dict[int, Heartbeat | None]:
    own = ['  File "/x/own.py", line 3\n']
    return {
        rank: replace(BEAT, rank=rank, step=step, marks=marks, **({"main_stack": own} if rank in outside else {}))
        for rank, (step, marks) in enumerate(progress)
    }


@pytest.mark.parametrize(
    ("answers", "blamed"),
    [
        (ranks_at((7, 12), (7, 9), (7, 12)), [1]),
        (ranks_at((7, 1), (6, 30), (7, 1)), [1]),
        (ranks_at((7, 12), (7, 9), (7, 8), (7, 8)), [2, 3]),
        (ranks_at((7, 12), (7, 12), (7, 12), outside=(2,)), [2]),
        (ranks_at((7, 12), (7, 12)), []),
        (ranks_at((7, 12)), [0]),
        ({**ranks_at((7, 12), (7, 12), (7, 1)), 1: None}, [1]),
    ],
)
def test_the_rank_the_others_wait_for_is_blamed(answers: dict[int, Heartbeat | None], blamed: list[int]) -> None:
    assert judge(dict.fromkeys(answers, BEAT), answers).ranks == blamed


def test_a_stopped_process_a_dead_one_and_one_never_seen_are_told_apart() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        timer = PhaseTimer(HostClock(), None)
        own = take(0, step=3, timer=timer)
        beats = {
            0: own,
            1: replace(own, rank=1, pid=sleeper.pid, started=started(sleeper.pid)),
            2: replace(own, rank=2, pid=2**22 - 1),
            3: None,
            4: replace(own, rank=4, started=own.started + 1),
        }
        assert 0 < own.started < started(sleeper.pid)
        os.kill(sleeper.pid, 19)
        deadline = time.monotonic() + 10
        while "(SIGSTOP)" not in judge(beats, {0: own, 1: None}).why and time.monotonic() < deadline:
            time.sleep(0.01)
        why = judge(beats, {0: own, 1: None, 2: None, 3: None, 4: None}).why.split("; ")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert why[0].startswith(f"rank 1 (process {sleeper.pid} on ")
    assert why[0].endswith("it is stopped (SIGSTOP)")
    assert any("never wrote a heartbeat" in line for line in why)
    assert sum("it is gone" in line for line in why) == 2, "rank 2's process never was, and rank 4's number belongs to another by now"


def test_a_heartbeat_tells_where_the_main_thread_stands_and_reads_back(tmp_path: Path) -> None:
    timer = PhaseTimer(HostClock(), None)
    timer.enter("encode")
    beats: list[Heartbeat] = []
    thread = Thread(target=lambda: beats.append(take(2, step=9, timer=timer, whole=True)))
    thread.start()
    thread.join()
    (beat,) = beats
    assert (beat.rank, beat.progress, beat.phase) == (2, (9, 1), "encode")
    assert "test_a_heartbeat_tells_where_the_main_thread_stands" in beat.stacks
    assert any("    thread." in line for line in beat.main_stack), "started, or waited for"
    beat.write(tmp_path / "beat.json")
    assert Heartbeat.read(tmp_path / "beat.json") == beat
    (tmp_path / "beat.json").write_text("{")
    assert Heartbeat.read(tmp_path / "beat.json") is None


def test_the_report_holds_every_rank_and_its_stack() -> None:
    answers = ranks_at((7, 12), (7, 9))
    answers[1] = None
    text = report(judge({0: BEAT, 1: None}, answers), {0: BEAT, 1: None}, answers, seconds=4.0)
    assert text.startswith("no rank got further for 4 s: rank 1 does not answer")
    assert "=== rank 0 (process 1 on here), step 7, phase contrast, now" in text
    assert "torch/dist.py" in text
    assert "=== rank 1: nothing known" in text


def test_ranks_wait_as_long_as_rank_0_writes_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    timer, step = PhaseTimer(HostClock(), None), [4]
    other = Mesh(rank=1, world=2, local_rank=1, device=torch.device("cpu"))
    dog = Watchdog(tmp_path, other, timer, step=lambda: step[0], limit_s=5.0, patient_s=60.0)
    assert dog._patience() == 60.0, "a call's first step"
    step[0] = 6
    assert dog._patience() == 5.0
    timer.enter("checkpoint")
    timer.enter("communication")
    (tmp_path / "heartbeats").mkdir()
    for count, (phase, patience) in enumerate({"encode": 5.0, "communication": 5.0, "checkpoint": 60.0}.items()):
        replace(BEAT, phase=phase, count=count).write(dog._path(0))
        dog._look_at_rank_0()
        assert dog._patience() == patience, phase
    dog._rank_0_seen_s -= 1.6  # three heartbeats are written in 1.5 s
    dog._look_at_rank_0()
    assert dog._patience() == 5.0, "rank 0 has said nothing since"
    replace(BEAT, phase="checkpoint", count=9).write(dog._path(0))
    dog._look_at_rank_0()
    assert dog._patience() == 60.0


HANGS = """
import pathlib, sys, time
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PhaseTimer
from clipscale.phases.clocks import HostClock
from clipscale.watch.watchdog import Watchdog
folder = pathlib.Path(sys.argv[1])
with Watchdog(folder, Mesh.single(), PhaseTimer(HostClock(), None), step=lambda: 9, limit_s=0.5, patient_s=0.5):
    if sys.argv[2] == "spoilt":
        (folder / "heartbeats").rename(folder / "aside")
        (folder / "heartbeats").touch()
    time.sleep(120)
"""


@pytest.mark.parametrize("disk", ["whole", "spoilt"])
def test_a_hang_ends_the_process_with_its_stack_also_where_no_other_rank_can_be_asked(tmp_path: Path, disk: str) -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS, tmp_path, disk], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert "step 9: the only rank gets no further in phase other" in ended.stderr
    assert 'File "<string>", line 12, in <module>' in ended.stderr, "where it sleeps"
    assert ("other ranks cannot be asked" in ended.stderr) == (disk == "spoilt")
    assert (tmp_path / "hangs" / "step-00000009.txt").exists()


# --- the lease -------------------------------------------------------------------------------------------------


def test_a_lease_that_another_machine_counts_on_refuses_and_one_that_stands_still_is_taken_over(tmp_path: Path) -> None:
    other = {"host": "elsewhere", "pid": 7, "id": "x", "count": 3}
    (tmp_path / "lease.json").write_text(json.dumps(other))
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, pathlib, sys, time\npath = pathlib.Path(sys.argv[1])\nfound = json.loads(path.read_text())\n"
            "for found['count'] in range(4, 500):\n    aside = path.with_suffix('.aside')\n    aside.write_text(json.dumps(found))\n"
            "    aside.replace(path)\n    time.sleep(0.02)",
            str(tmp_path / "lease.json"),
        ]
    )
    try:
        with pytest.raises(RunFolderError, match="is being written by process 7 on elsewhere"):
            Lease.take(tmp_path, count_every_s=0.05, wait_s=5.0)
    finally:
        writer.kill()
        writer.wait()
    lease = Lease.take(tmp_path, count_every_s=0.05, wait_s=0.2)
    deadline = time.monotonic() + 10
    while json.loads((tmp_path / "lease.json").read_text())["count"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    found = json.loads((tmp_path / "lease.json").read_text())
    assert (found["pid"], found["count"] >= 3) == (os.getpid(), True)
    lease.give_back()
    assert not (tmp_path / "lease.json").exists()
    lost = Lease.take(tmp_path, count_every_s=60.0)
    (tmp_path / "lease.json").write_text(json.dumps(other))
    lost.give_back()
    assert json.loads((tmp_path / "lease.json").read_text()) == other, "another's lease is not given back"


def test_a_run_whose_lease_was_taken_over_ends(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom clipscale.watch.lease import Lease\n"
        "lease = Lease.take(pathlib.Path(sys.argv[1]), count_every_s=0.05)\nprint('held', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    aside = tmp_path / "aside"
    aside.write_text(json.dumps({"host": "elsewhere", "pid": 7, "id": "x", "count": 1}))
    aside.replace(tmp_path / "lease.json")
    _, said = holder.communicate(timeout=30)
    assert holder.returncode == 1
    assert (tmp_path / "lease.json").exists()
    assert "is being written by process 7 on elsewhere; this run ends" in said
