"""A run's model: its settings become encoders, freshly initialised; and whether its engine can train them."""

from __future__ import annotations

import torch

from clipscale.config import Run
from clipscale.model import Encoders, PairKindModel, build_encoders


def build_model(run: Run) -> Encoders:
    """The run's encoders, freshly initialised from its seed."""
    kinds = {
        name: PairKindModel(
            modalities=kind.modalities,
            init_scale=kind.temperature.initial_scale,
            max_scale=kind.temperature.max_scale,
            init_bias=kind.temperature.initial_bias if kind.temperature.initial_bias is not None else kind.objective.init_bias,
        )
        for name, kind in run.pair_kinds.items()
    }
    return build_encoders(run.towers, embed_dim=run.embed_dim, pair_kinds=kinds, seed=run.seed)


def check_model(run: Run) -> None:
    """Build names and shapes only, on the meta device, and refuse what the run's engine cannot train.

    Raises:
        RequestError: says what was asked, what was found and what to do.
    """
    with torch.device("meta"):
        model = build_model(run)
    run.engine.check_model(model, optimizer=run.optimizer, steps_differ=steps_differ(run))


def check_precision(run: Run, model: Encoders, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        RequestError: says what was asked and what was found.
    """
    if run.precision == "fp8":
        from clipscale.towers._float8 import check_float8

        check_float8([model.tower(modality) for modality in model.modalities], device)


def use_precision(run: Run, model: Encoders) -> None:
    """Give the model the layers that its precision needs for training; names and weights stay."""
    if run.precision == "fp8":
        from clipscale.towers._float8 import use_float8

        for modality in model.modalities:
            use_float8(model.tower(modality))


def steps_differ(run: Run) -> bool:
    """Whether some steps leave out a pair kind and its towers."""
    return any(kind.every > 1 for kind in run.pair_kinds.values())
