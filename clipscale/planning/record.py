"""Record: a plan as JSON, every figure with its unit in its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clipscale.planning.advice import Suggestion
from clipscale.planning.plan import Plan, Row


def record(rows: Sequence[Row], advice: Sequence[Suggestion]) -> dict[str, Any]:
    """A sweep, the last row of which is what was asked for."""
    last = rows[-1].plan
    assert last is not None, "what was asked for has a plan"
    return {
        "run": last.run.name,
        "gpu": {"name": last.gpu_name, **last.gpu.model_dump(mode="json")},
        "plan": _plan(last),
        "suggestions": [{"change": one.change, **_short(one.plan)} for one in advice],
        "sweep": [{"nodes": row.nodes, "refused": row.refused} if row.plan is None else _short(row.plan) for row in rows],
    }


def _short(plan: Plan) -> dict[str, Any]:
    return {
        "nodes": plan.nodes,
        "gpus": plan.gpus,
        "micro_batch": plan.layout.micro_batch,
        "memory_bytes": plan.fullest.total,
        "fits": plan.fits,
        "step_seconds": plan.step.total,
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
        "hours": _finite(plan.expected_hours),
        "dollars": _finite(plan.dollars),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        **_short(plan),
        "limit_bytes": plan.gpu.limit_bytes,
        "largest_micro_batch": plan.largest_micro_batch,
        "moments_bytes": {moment.name: dict(moment.bytes) for moment in plan.moments},
        "received_bytes": [
            {"what": each.what, "how": each.kind, "in_node": each.node_bytes, "network": each.network_bytes} for each in plan.exchanges
        ],
        "grid": list(plan.grid),
        "best_grid": list(plan.best_grid),
        "phases_seconds": dict(plan.step.by_phase),
        "model_flops_of_a_rank": plan.step.flops,
        "hours_without_interruptions": plan.hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "goodput": [
            {
                "rate": each.rate,
                "hours_between_interruptions": each.hours_between,
                "best_interval_steps": max(1, round(each.best_interval_s / plan.step.total)),
                "share": each.share,
                "share_as_set": each.share_as_set,
            }
            for each in plan.goodput
        ],
        "reading": {
            "samples_per_second": plan.reading.samples_per_second,
            "megabytes_per_second": plan.reading.megabytes_per_second,
            "cores_of_a_node": plan.reading.cores,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
