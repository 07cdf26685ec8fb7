"""The doctor on several ranks: one finding a check, speeds and clocks of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_run, write_squares

from clipscale.config import Run, validate
from clipscale.doctor import Finding, examine
from clipscale.doctor.ranks import clock_skew
from clipscale.parallel.mesh import Mesh


def examined(mesh: Mesh, settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in examine(validate(Run, settings), mesh, quick=False)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_come_to_the_same_findings(engine: str, ranks: Callable[[int], Any], tmp_path: Path) -> None:
    settings = tiny_run(tmp_path / "runs", write_squares(tmp_path, samples=48), engine=engine)
    first, second = ranks(2)(examined, settings)
    assert first == second
    found = {finding["name"]: Finding(**finding) for finding in first}
    assert not [finding for finding in found.values() if finding.state == "problem"]
    assert re.search(r"^[\d.]+ GB/s a rank by gloo over 2 ranks", found["bandwidth"].found)
    assert "losses image_text" in found["one step"].found


def skewed(mesh: Mesh, seconds: float) -> dict[str, Any]:
    """The check on ranks of which the last one's clock goes wrong."""
    from clipscale.doctor import ranks as module

    right = module.time.time
    module.time.time = lambda: right() + seconds * (mesh.rank == mesh.world - 1)  # type: ignore[assignment]
    try:
        return asdict(clock_skew(mesh))
    finally:
        module.time.time = right


def test_a_clock_that_goes_wrong_is_seen(ranks: Callable[[int], Any]) -> None:
    (found, _) = ranks(2)(skewed, 30.0)
    assert found["state"] == "warning"
    milliseconds = float(re.search(r"at most ([\d,.]+) ms", found["found"])[1].replace(",", ""))  # type: ignore[index]
    assert milliseconds == pytest.approx(30_000, abs=500)
