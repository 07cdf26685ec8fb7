"""The line of metrics.jsonl that a step leaves: what the seed determines. Numbers that are not finite are null, as JSON wants it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clipscale.config import Run
from clipscale.training_step import Taken


def kind_records(taken: Taken, due: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By pair kind, the loss and what is known besides.

    Args:
        due: what the data say of each pair kind of this step.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, known in due.items():
        records[name] = {"loss": None, **known}
        if name in taken.losses:
            output, result = taken.losses[name]
            bias = {} if output.bias is None else {"bias": _number(output.bias.detach())}
            metrics = {key: _number(value) for key, value in result.metrics.items()}
            records[name] = {"loss": _number(result.loss.detach()), "scale": _number(output.scale.detach()), **bias, **metrics, **known}
    return records


def step_record(run: Run, taken: Taken, kinds: Mapping[str, Mapping[str, Any]], *, step: int, lr: float, left_out: int) -> dict[str, Any]:
    """A step's numbers.

    Args:
        kinds: as `kind_records` gives them.
        left_out: steps that changed nothing since the run began.
    """
    stepped = taken.stepped
    losses = [run.pair_kinds[name].loss_weight * kind["loss"] for name, kind in kinds.items() if kind["loss"] is not None]
    return {
        "step": step,
        "samples": sum(math.ceil(step / kind.every) * kind.global_batch for kind in run.pair_kinds.values()),
        "lr": lr,
        "grad_norm": _number(stepped.norm),
        "grad_norms": {name: _number(norm) for name, norm in stepped.norms.items()},
        **({} if stepped.loss_scale is None else {"loss_scale": stepped.loss_scale, "skipped": int(stepped.skipped)}),
        "loss": math.fsum(losses) if len(losses) == len(kinds) else None,
        **({"left_out": left_out} if left_out else {}),
        "kinds": kinds,
    }


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
