"""The scripts of launch/, run by bash; Slurm's commands and the interpreter below them write down what they are told."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
NASTY = " \t\n'\"\\$`*?[]{}()<>|&;#~!=%^,:-äß→"

RECORD = """
import json, os, sys, time
def record(**told):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(told) + "\\n")
"""
SRUN = (
    RECORD
    + """
command = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("-"))
record(program="srun", options=sys.argv[1:command])
os.execvpe(sys.argv[command], sys.argv[command:], {**os.environ, "SLURM_NODEID": "1"})
"""
)
SCONTROL = (
    RECORD
    + """
record(program="scontrol", arguments=sys.argv[1:])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("host3\\nhost4")
"""
)
SCANCEL = RECORD + 'record(program="scancel", arguments=sys.argv[1:])'
APPTAINER = (
    RECORD
    + """
record(program="apptainer", arguments=sys.argv[1:])
os.execvp("bash", sys.argv[sys.argv.index("bash"):])
"""
)
PYTHON = (
    RECORD
    + """
what = "count" if sys.argv[1] == "-c" else "check" if "--check" in sys.argv else "launch"
if what == "count":
    print(8)
record(program=what, arguments=sys.argv[1:], environment=dict(os.environ))
awaited = f'"program": "{os.environ.get("WAIT_FOR", what)}"'
while what == "launch" and awaited not in open(os.environ["RECORD"]).read():
    time.sleep(0.01)
sys.exit(int(os.environ.get({"check": "CHECK_STATUS", "launch": "STATUS"}.get(what, ""), 0)))
"""
)


class Machine:
    """A PATH of programs that record how they are called, and scripts run on it as job 17, restarted twice, on two nodes."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record"
        self.record.touch()
        programs = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "apptainer": APPTAINER, "python": PYTHON}
        for name, text in programs.items():
            (folder / name).write_text(f"#!{sys.executable} -ISs\n{text}")
            (folder / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "host[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": "2"}
        own = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "RECORD": str(self.record)}
        self.environment = {**os.environ, **slurm, **own}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The script, running."""
        command = ["bash", f"launch/{script}", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The script's exit code and output."""
        with self.start(script, *arguments, **environment) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def told(self, program: str) -> list[dict[str, Any]]:
        """The calls of one program."""
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [call for call in calls if call["program"] == program]

    def wait_for(self, program: str) -> None:
        """Until the program has been called."""
        deadline = time.monotonic() + 60
        while not self.told(program):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def requeued(self) -> bool:
        """Whether the job went back into the queue."""
        return ["requeue", "17"] in [call["arguments"] for call in self.told("scontrol")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without torch and Slurm."""
    return Machine(tmp_path)


def option(arguments: list[str], name: str) -> str:
    """The word behind an option."""
    return arguments[arguments.index(name) + 1]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT / "launch", capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "slurm_eval.sbatch"])
def test_any_argument_arrives_as_it_was_typed(machine: Machine, script: str) -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices(NASTY, k=chance.randrange(8))) for _ in range(50)]
    assert machine.run(script, "train", *words, NNODES="1").returncode == 0
    (check,), (launch,) = machine.told("check"), machine.told("launch")
    assert check["arguments"][:3] == ["-m", "clipscale", "train"]
    assert check["arguments"][3:53] == words
    assert launch["arguments"][-53:] == ["-m", "clipscale", "train", *words]


def test_a_node_starts_a_process_a_gpu_and_checks_for_all_of_them_first(machine: Machine) -> None:
    machine.run("torchrun.sh", "train", "a.yaml")
    assert [option(machine.told("check")[0]["arguments"], "--ranks")] == ["8"]
    arguments = machine.told("launch")[0]["arguments"]
    assert arguments[:2] == ["-m", "clipscale.launcher"]
    assert "--standalone" in arguments
    assert (option(arguments, "--nproc-per-node"), option(arguments, "--max-restarts")) == ("8", "0")
    assert "--log-dir" not in arguments


def test_settings_of_the_launch_reach_it(machine: Machine) -> None:
    settings = {"NPROC_PER_NODE": "3", "MAX_RESTARTS": "2", "SHUTDOWN_TIMEOUT": "9", "LOG_DIR": "my logs", "INTERFACE": "ib0"}
    machine.run("torchrun.sh", "eval", "runs/a", NNODES="4", NODE_RANK="2", RDZV_ENDPOINT="host0:1", RDZV_ID="x", **settings)
    launch = machine.told("launch")[0]
    names = ("nproc-per-node", "max-restarts", "shutdown-timeout", "log-dir", "nnodes", "node-rank", "rdzv-endpoint", "rdzv-id")
    assert [option(launch["arguments"], f"--{name}") for name in names] == ["3", "2", "9", "my logs/node-2", "4", "2", "host0:1", "x"]
    assert launch["environment"]["NCCL_SOCKET_IFNAME"] == launch["environment"]["GLOO_SOCKET_IFNAME"] == "ib0"
    assert not machine.told("check"), "only training has a check"


def test_a_wrong_request_ends_before_anything_is_launched(machine: Machine) -> None:
    assert machine.run("torchrun.sh", "train", "a.yaml", CHECK_STATUS="2").returncode == 2
    assert not machine.told("launch")


def test_several_nodes_need_a_meeting_point(machine: Machine) -> None:
    result = machine.run("torchrun.sh", "eval", "runs/a", NNODES="2")
    assert result.returncode != 0
    assert "RDZV_ENDPOINT=host:port of node 0 is needed" in result.stderr
    assert not machine.told("launch")


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "slurm_eval.sbatch"])
def test_without_arguments_a_script_says_how_it_is_used(machine: Machine, script: str) -> None:
    result = machine.run(script)
    assert result.returncode == 2
    assert f"launch/{script}" in result.stderr
    assert not machine.told("launch")


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_eval.sbatch"])
def test_nodes_of_a_job_meet_on_its_first_and_not_those_of_its_earlier_life(machine: Machine, script: str) -> None:
    machine.run(script, "train", "a.yaml")
    arguments = machine.told("launch")[0]["arguments"]
    names = ("nnodes", "node-rank", "rdzv-endpoint", "rdzv-id", "log-dir")
    assert [option(arguments, f"--{name}") for name in names] == ["2", "1", "host3:20017", "17-2", "logs/17/node-1"]
    assert machine.told("srun")[0]["options"] == ["--kill-on-bad-exit=0"]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (137, False), (138, True), (140, True), (143, False)])
def test_only_a_run_that_a_scheduler_stopped_goes_back_into_the_queue(machine: Machine, status: int, requeued: bool) -> None:
    assert machine.run("slurm.sbatch", "train", "a.yaml", STATUS=str(status)).returncode == status
    assert machine.requeued == requeued


@pytest.mark.parametrize(("status", "requeued"), [(140, True), (0, False), (1, False)])
def test_the_run_and_not_the_signal_decides_whether_it_goes_on(machine: Machine, status: int, requeued: bool) -> None:
    """A run may have finished or failed by itself just before it was told to stop."""
    with machine.start("slurm.sbatch", "train", "a.yaml", STATUS=str(status), WAIT_FOR="scancel") as job:
        machine.wait_for("launch")
        job.send_signal(signal.SIGUSR2)
        job.communicate(timeout=60)
    assert job.returncode == status
    assert machine.told("scancel")[0]["arguments"] == ["--signal=USR2", "17"], "to the ranks, not to the script"
    assert machine.requeued == requeued


def test_a_cancelled_job_waits_for_its_ranks(machine: Machine) -> None:
    with machine.start("slurm.sbatch", "train", "a.yaml", STATUS="143", WAIT_FOR="enough") as job:
        machine.wait_for("launch")
        job.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(timeout=0.3)
        with machine.record.open("a") as record:
            record.write(json.dumps({"program": "enough"}) + "\n")
        job.communicate(timeout=60)
    assert job.returncode == 143
    assert not machine.requeued


def test_an_evaluation_is_never_requeued(machine: Machine) -> None:
    assert machine.run("slurm_eval.sbatch", "eval", "runs/a", STATUS="140").returncode == 140
    assert not machine.requeued


def test_ranks_run_in_a_container_of_pyxis(machine: Machine) -> None:
    machine.run("slurm.sbatch", "train", "a.yaml", CONTAINER="lab/clipscale:1", MOUNTS="/disk 1:/data")
    options = machine.told("srun")[0]["options"]
    assert options[1:] == [
        "--container-image=lab/clipscale:1",
        f"--container-mounts={ROOT}:{ROOT},/disk 1:/data",
        f"--container-workdir={ROOT}",
    ]


def test_ranks_run_in_a_container_of_apptainer(machine: Machine) -> None:
    machine.run("slurm.sbatch", "train", "a b.yaml", CONTAINER="my image.sif", MOUNTS="/disk:/data")
    expected = ["exec", "--nv", "--bind", f"{ROOT},/disk:/data", "--pwd", str(ROOT), "my image.sif", "bash"]
    assert machine.told("apptainer")[0]["arguments"][:8] == expected
    assert machine.told("launch")[0]["arguments"][-2:] == ["train", "a b.yaml"]
