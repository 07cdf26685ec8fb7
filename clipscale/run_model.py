"""A run's model: its settings become encoders, freshly initialised."""

from __future__ import annotations

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
