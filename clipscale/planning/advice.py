"""Advice: what to change when a run does not fit, or could go faster; every suggestion is planned before it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipscale.config import Run, merge, validate
from clipscale.errors import ClipscaleError
from clipscale.planning.plan import Plan, Planner


@dataclass(frozen=True)
class Suggestion:
    """A change of settings, and what it makes of the plan."""

    change: str
    """As overrides of the command line."""
    plan: Plan


def suggestions(plan: Plan) -> list[Suggestion]:
    """For a run that does not fit: changes with which it does, the fastest first; for one that fits: what is faster."""
    tried = []
    for change, settings in _changes(plan):
        try:
            run = validate(Run, merge(plan.run.model_dump(mode="json", serialize_as_any=True), settings))
            planner = Planner(run, gpu_name=plan.gpu_name, gpu=plan.gpu, gpus_per_node=plan.layout.world // plan.nodes)
            tried.append(Suggestion(change, planner.plan(plan.nodes)))
        except ClipscaleError:
            continue  # not a change that this run can make
    better = [one for one in tried if one.plan.fits and (not plan.fits or one.plan.step.total < 0.98 * plan.step.total)]
    return sorted(better, key=lambda one: one.plan.step.total)


def _changes(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    largest, rows = plan.largest_micro_batch, plan.layout.micro_batch
    if largest and largest != rows and (largest > rows or not plan.fits):
        yield f"micro_batch={largest}", {"micro_batch": largest}
    if not plan.fits:
        yield from _that_hold_less(plan)
    if plan.best_grid != plan.grid:
        yield f"contrast.grid_rows={plan.best_grid[0]}", {"contrast": {"grid_rows": plan.best_grid[0]}}


def _that_hold_less(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    unmade = [name for name, tower in plan.run.towers.items() if tower.recompute is None and tower.locked is False]
    auto: dict[str, Any] = {"micro_batch": "auto"}
    if unmade:
        towers: Mapping[str, Any] = {name: {"recompute": True} for name in unmade}
        yield " ".join(f"towers.{name}.recompute=true" for name in unmade) + " micro_batch=auto", {**auto, "towers": towers}
    if plan.gpus > 1:
        yield "engine=fsdp2 micro_batch=auto", {**auto, "engine": {"name": "fsdp2"}}
        yield "engine.name=fsdp2 engine.gathered=block micro_batch=auto", {**auto, "engine": {"name": "fsdp2", "gathered": "block"}}
    if plan.run.precision == "fp32" and "bf16" in plan.gpu.tflops:
        yield "precision=bf16 micro_batch=auto", {**auto, "precision": "bf16"}
