"""The examination: every check in turn, on all ranks, and one finding for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from clipscale.config import Run
from clipscale.doctor import machine, miniature, ranks, sources
from clipscale.doctor.finding import Finding, asked, of_all_ranks, worst
from clipscale.model import Encoders
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model


def examine(run: Run | None, mesh: Mesh, *, quick: bool) -> list[Finding]:
    """One finding for each check, of all ranks together. All ranks ask together; the order of checks is the same on all.

    Args:
        run: checks its data, and takes one step of it; None: the machine alone.
        quick: leaves out what takes more than a moment: speeds, samples, the step.
    """
    return [_of_all(finding, mesh) for finding in _checks(run, mesh, quick=quick)]


def _of_all(own: Finding, mesh: Mesh) -> Finding:
    return of_all_ranks([Finding(**finding) for finding in mesh.gather_objects(asdict(own))])


def _checks(run: Run | None, mesh: Mesh, *, quick: bool) -> Iterator[Finding]:
    folder = Path(run.folder if run else ".")
    yield asked("python", machine.python)
    yield asked("packages", machine.packages)
    yield asked("gpus", partial(machine.gpus, wanted=run is not None and run.device == "cuda"))
    yield asked("shared memory", machine.shared_memory)
    yield asked("open files", machine.open_files)
    yield asked("disk room", partial(machine.room, folder))
    if not quick:
        yield asked("disk speed", partial(machine.disk_speed, folder))
        yield from ranks.between_ranks(mesh) if mesh.world > 1 else ranks.between_two_processes()
    if run is not None:
        yield from _of_run(run, mesh, quick=quick)


def _of_run(run: Run, mesh: Mesh, *, quick: bool) -> Iterator[Finding]:
    shapes: list[Encoders] = []

    def build() -> Finding:
        run.check_world(mesh.world) if mesh.world > 1 else None
        with torch.device("meta"):
            shapes.append(build_model(run))
        return Finding("model", "ok", f"{sum(parameter.numel() for parameter in shapes[0].parameters()) / 1e6:,.1f} million parameters")

    yield asked("model", build)
    if not shapes:
        return
    yield from sources.data(run, shapes[0].inputs(), quick=quick)
    if not quick:
        yield asked("one step", partial(miniature.one_step, run, mesh, shapes[0]))


def print_findings(findings: list[Finding]) -> None:
    """A line for each check, and under it what to do."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:8} {finding.name:{width}}  {finding.found}")
        if finding.advice:
            print(f"{'':8} {'':{width}}  → {finding.advice}")


def write_json(path: Path, findings: list[Finding]) -> None:
    """The findings, and the worst of their states, as JSON."""
    record = {"state": worst(findings), "checks": [asdict(finding) for finding in findings]}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
