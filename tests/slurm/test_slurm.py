"""launch/slurm.sbatch on a real Slurm of two nodes: told to stop, cancelled, out of time, with a node lost, failed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, why_not
from tiny import tiny_run, write_squares, write_tones

from clipscale.metrics import read_json_lines

ROOT = Path(__file__).parents[2]
LOGS = Path(__file__).parent / "logs"
STEPS = 400

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


class Runs:
    """Training jobs of one configuration under several names."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        squares, tones = write_squares(folder, samples=48), write_tones(folder, samples=24)
        settings = tiny_run(folder / "runs", squares, tones, engine="ddp", steps=STEPS, checkpoints={"every_steps": 20})
        queries = {"modality": "image", "source": {"name": "shards", "url": str(squares)}}
        judge = {"name": "retrieval", "queries": queries, "gallery": {"modality": "text"}}
        (folder / "run.yaml").write_text(yaml.safe_dump({**settings, "evaluations": {"squares": judge}}))

    def submit(self, name: str, *options: str) -> int:
        """Train on both nodes, a process each; the job's number."""
        return self.sbatch("slurm.sbatch", name, "--nodes=2", *options, then=["train", f"{self.folder}/run.yaml", f"name={name}"])

    def sbatch(self, script: str, name: str, *options: str, then: list[str]) -> int:
        """Submit a script with what it runs; its output and its ranks' go to LOGS."""
        settings = {
            "PYTHON": sys.executable,
            "NPROC_PER_NODE": "1",
            "INTERFACE": "eth0",
            "LOG_DIR": str(LOGS / name),
            "SHUTDOWN_TIMEOUT": "20",
        }
        export = ",".join(["ALL", *(f"{key}={value}" for key, value in settings.items())])
        small = ["--gpus-per-node=1", "--cpus-per-task=1", f"--output={LOGS}/{name}.log", f"--chdir={ROOT}", f"--export={export}"]
        told = self.cluster.slurm("sbatch", *small, *options, f"{ROOT}/launch/{script}", *then)
        return int(re.findall(r"\d+", told)[0])

    def path(self, name: str) -> Path:
        """The run folder."""
        return self.folder / "runs" / name

    def wait_for_step(self, name: str, step: int) -> None:
        """Until the run has taken the step."""

        def taken() -> bool:
            file = self.path(name) / "metrics.jsonl"
            return file.exists() and any(line["step"] >= step for line in read_json_lines(file))

        self.cluster.wait(taken, what=f"{name} to take step {step}")

    def wait_for_end(self, job: int, *, state: str) -> dict[str, str]:
        """Until the job is done for good; from the queue it comes back at once and not, as Slurm has it, after two minutes."""
        hurried = set()

        def ended() -> bool:
            found = self.cluster.job(job)
            if found["JobState"] == "PENDING" and found.get("Reason") == "BeginTime" and found["Restarts"] not in hurried:
                hurried.add(found["Restarts"])  # Slurm revokes the credentials of a job that starts twice in one second
                self.cluster.slurm("scontrol", "update", f"JobId={job}", "StartTime=now+5", "TimeLimit=30")
            return found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")

        self.cluster.wait(ended, what=f"job {job} to end", timeout_s=600)
        found = self.cluster.job(job)
        assert found["JobState"] == state, found
        return found

    def ended(self, name: str) -> dict[str, Any]:
        """How the run says it ended."""
        found: dict[str, Any] = json.loads((self.path(name) / "ended.json").read_text())
        return found

    def same_as(self, name: str, other: str) -> bool:
        """Whether two runs have the same curves and weights, bit for bit."""
        files = ("metrics.jsonl", f"checkpoints/step-{STEPS:08d}/model.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors")
        return all((self.path(name) / file).read_bytes() == (self.path(other) / file).read_bytes() for file in files)

    def kill_rank(self, name: str) -> None:
        """kill -9 of one rank of the run."""
        ranks = [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdecimal() and f"-m\0clipscale\0train\0{self.folder}/run.yaml\0name={name}\0" in _command_line(process)
        ]
        assert ranks
        os.kill(max(ranks), signal.SIGKILL)


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The cluster, and a run that nobody disturbs."""
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir()
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder)
    try:
        cluster.start()
        started = Runs(cluster, tmp_path_factory.mktemp("runs"))
        started.wait_for_end(started.submit("undisturbed"), state="COMPLETED")
        yield started
    finally:
        cluster.stop()
        shutil.copytree(folder / "log", LOGS / "slurm")


def test_a_job_that_is_told_to_stop_goes_back_into_the_queue_and_ends_as_the_run_nobody_told(runs: Runs) -> None:
    job = runs.submit("told")
    runs.wait_for_step("told", 30)
    runs.cluster.slurm("scancel", "--batch", "--signal=USR2", str(job))
    ended = runs.wait_for_end(job, state="COMPLETED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "0:0")
    events = [line["event"] for line in read_json_lines(runs.path("told") / "events.jsonl")]
    lives = ["started", "stopped", "resumed", "finished"]
    assert [event for event in events if event in lives] == lives
    assert runs.same_as("told", "undisturbed")


def test_a_cancelled_job_leaves_a_checkpoint_and_stays_away(runs: Runs) -> None:
    job = runs.submit("cancelled")
    runs.wait_for_step("cancelled", 30)
    runs.cluster.slurm("scancel", str(job))
    assert runs.wait_for_end(job, state="CANCELLED")["Restarts"] == "0"
    runs.cluster.wait(lambda: (runs.path("cancelled") / "ended.json").exists(), what="the run to say how it ended")
    ended = runs.ended("cancelled")
    assert (ended["how"], ended["signal"]) == ("stopped", signal.SIGTERM)
    assert (runs.path("cancelled") / "checkpoints" / f"step-{ended['step']:08d}" / "manifest.json").exists()


def test_a_job_out_of_time_goes_on_in_another(runs: Runs) -> None:
    job = runs.submit("late", "--time=1", "--signal=B:USR2@35")
    ended = runs.wait_for_end(job, state="COMPLETED")
    assert ended["Restarts"] == "1"
    assert runs.same_as("late", "undisturbed")


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(runs: Runs) -> None:
    job = runs.submit("lost")
    runs.wait_for_step("lost", 30)
    runs.cluster.cut_off("n2")
    runs.cluster.wait(lambda: runs.cluster.job(job)["Restarts"] == "1", what="Slurm to requeue the job")
    runs.cluster.connect("n2")
    runs.wait_for_end(job, state="COMPLETED")
    assert runs.same_as("lost", "undisturbed")


def test_a_run_that_fails_while_it_is_told_to_stop_is_not_started_again(runs: Runs) -> None:
    job = runs.submit("broken")
    runs.wait_for_step("broken", 30)
    runs.kill_rank("broken")
    runs.cluster.slurm("scancel", "--batch", "--signal=USR2", str(job))
    ended = runs.wait_for_end(job, state="FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("0", "1:0")


def test_a_wrong_request_fails_with_its_own_code(runs: Runs) -> None:
    job = runs.sbatch("slurm.sbatch", "misspelt", "--nodes=2", then=["train", f"{runs.folder}/run.yaml", "stepps=3"])
    assert runs.wait_for_end(job, state="FAILED")["ExitCode"] == "2:0"
    assert "did you mean 'steps'?" in (LOGS / "misspelt.log").read_text()


def test_an_evaluation_waits_for_its_training(runs: Runs) -> None:
    job = runs.submit("judged")
    evaluation = runs.sbatch("slurm_eval.sbatch", "judge", f"--dependency=afterok:{job}", then=["eval", str(runs.path("judged"))])
    runs.wait_for_step("judged", 30)
    runs.cluster.slurm("scancel", "--batch", "--signal=USR2", str(job))
    assert runs.cluster.job(evaluation)["Reason"] == "Dependency"
    assert runs.wait_for_end(job, state="COMPLETED")["Restarts"] == "1"
    runs.wait_for_end(evaluation, state="COMPLETED")
    assert (runs.path("judged") / "evaluation.json").exists()
