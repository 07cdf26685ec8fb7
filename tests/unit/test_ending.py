"""How runs end: what a second signal means, and the file that says how it went."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipscale import signals
from clipscale.ending import PLACE, Ending, EndingFiles, places, read
from clipscale.signals import Repeats, stop_signals


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as it was, afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert set(stop_signals()) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@pytest.mark.parametrize(
    ("first", "then", "hurries"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGTERM, True),
        (signal.SIGUSR2, signal.SIGTERM, False),  # Slurm's time limit, while the checkpoint is being written
        (signal.SIGUSR2, signal.SIGUSR2, False),  # slurm.sbatch repeats it
    ],
)
def test_only_people_hurry(monkeypatch: pytest.MonkeyPatch, first: int, then: int, hurries: bool) -> None:
    repeats = Repeats()
    assert [repeats.hurries(first), repeats.hurries(then)] == [False, False], "at once it is an echo"
    monkeypatch.setattr(signals, "ECHO_S", -1.0)
    assert repeats.hurries(then) == hurries


def test_a_run_that_fails_says_why_and_one_that_goes_on_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ended.json"
    file.write_text("{}")

    def fail() -> None:
        with EndingFiles([file]):
            assert not file.exists()
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="full"):
        fail()
    assert read(file) == Ending("failed", error="ValueError: the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]


def test_an_ending_reads_back_with_its_exit_code(tmp_path: Path) -> None:
    codes = {Ending("finished", step=3): 0, Ending("stopped", step=3): 0, Ending("stopped", step=3, signal=15): 143, Ending("failed"): 1}
    for ending, code in codes.items():
        with EndingFiles([tmp_path / "a"]) as files:
            files.tell(ending)
        found = read(tmp_path / "a")
        assert found == ending
        assert found.exit_code == code
        assert json.loads((tmp_path / "a").read_text())["time"].endswith("Z")
    assert read(tmp_path / "nowhere") is None


def test_rank_0_writes_into_the_run_folder_and_each_nodes_first_rank_where_its_launcher_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    run, own = Path("run"), Path("of/launcher")
    monkeypatch.delenv(PLACE, raising=False)
    assert places(run, rank=0, local_rank=0) == [run / "ended.json"]
    monkeypatch.setenv(PLACE, str(own))
    assert places(run, rank=0, local_rank=0) == [run / "ended.json", own]
    assert places(run, rank=8, local_rank=0) == [own]
    assert places(run, rank=1, local_rank=1) == []
