"""Ranks that are killed and come back as other ranks with other workers: `make soak` runs 200 trials, this the first eight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "order_trials.py"


def test_killed_and_changed_ranks_lose_no_sample_and_repeat_none() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--trials", "8"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout
    found = json.loads(run.stdout)
    assert (found["trials"], found["lost"], found["repeated"], found["differing"], found["strayed"]) == (8, 0, 0, 0, 0)
    assert found["kills"] >= 12
    assert found["largest_state_bytes"] <= 4096
    assert len(found["ranks"]) >= 6  # of 1 to 8
    assert len(found["workers"]) == 9  # 0 to 8
