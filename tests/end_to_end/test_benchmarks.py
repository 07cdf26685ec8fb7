"""Every benchmark runs at its smoke size; what it measures there means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_smoke(script: str) -> None:
    result = subprocess.run([sys.executable, str(FOLDER / script), "--smoke"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["versions"]["torch"]
    assert all(value >= 0 for name, value in measured.items() if " over " in name)
