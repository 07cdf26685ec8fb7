"""The main job: the demo from nothing to its report, what it must reach, and that a second call reuses what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipscale.metrics import read_json_lines

BARS = {
    ("digits", "top1"): 0.93,
    ("intents_new_voices", "by_name_accuracy"): 0.85,
    ("intents_new_voices_and_phrasings", "by_name_accuracy"): 0.55,
    ("speech_to_image", "speech_to_image_top1_match"): 0.70,
}
"""(evaluation, figure) -> what the held-out figure must reach."""


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    """`clipscale demo` in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipscale", "demo"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1500)
def test_the_demo_reaches_its_bars_resumes_and_is_not_done_twice(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "demo"

    found = json.loads((run / "evaluation.json").read_text())
    for (evaluation, name), bar in BARS.items():
        figure = next(figure for figure in found[evaluation]["figures"] if figure["name"] == name)
        assert figure["value"] >= bar, (evaluation, figure)
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["n"] >= 400
    events = [(record["event"], record["step"]) for record in read_json_lines(run / "events.jsonl")]
    turns = [event for event in events if event[0] not in {"checkpoint", "straggler"}]  # a rank may lag on a busy machine
    assert turns == [
        ("started", 0),
        ("stopped", 200),
        ("resumed", 200),
        ("finished", 400),
    ]
    assert [record["step"] for record in read_json_lines(run / "metrics.jsonl")] == list(range(1, 401))
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing is written elsewhere"

    metrics = (run / "metrics.jsonl").read_bytes()
    again = demo(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stderr
    assert (run / "metrics.jsonl").read_bytes() == metrics
