"""StepWork: how many FLOPs a step of a run takes, counted when it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from clipscale.config import Run
from clipscale.contrast import ContrastSettings
from clipscale.contrast.cost import cost_of
from clipscale.inputs import Modality
from clipscale.model import Encoders, PreparedKinds
from clipscale.parallel.mesh import Mesh
from clipscale.throughput.flops import SampleFlops, count_sample, input_length
from clipscale.towers._text_tower import TextTower

_ALL_KEPT = ContrastSettings(cache_bytes=2**62, backend="torch")  # no logit is computed twice


@dataclass(frozen=True)
class StepWork:
    """FLOPs of what stands in a step's batches: of each sample in its tower and projection, and of each pair kind's loss."""

    towers: Mapping[Modality, SampleFlops]
    """Without those whose features are cached: how much of them a step computes, the batch alone does not tell."""
    contrast: Mapping[str, int]
    """Of the loss over a global batch, by pair kind: products of embeddings that give logits, and gradients."""
    world: int
    ranks_of_a_row: int
    """So many ranks share each row's work (tensor parallelism)."""

    def of(self, kinds: PreparedKinds) -> int:
        """This rank's share of a step on these rows, as they were read."""
        towers = sum(
            self.towers[modality].at(input_length(rows)) * len(next(iter(rows.values())))
            for modalities in kinds.values()
            for modality, rows in modalities.items()
            if modality in self.towers
        )
        return towers // self.ranks_of_a_row + sum(self.contrast[kind] for kind in kinds) // self.world


def count_work(run: Run, model: Encoders, mesh: Mesh, *, data_ranks: int) -> StepWork | None:
    """Rank 0 counts, on its whole model before any engine has it, and tells the others; None, and a line, if a tower cannot be counted."""
    told = None
    if mesh.is_main:
        try:
            told = {modality: sorted(_tower(run, model, modality).counted.items()) for modality in _computed(run, model)}
        except Exception as error:
            print(f"FLOPs are not counted, and MFU is left out: {type(error).__name__}: {error}", file=sys.stderr)
    told = mesh.gather_objects(told)[0]
    if told is None:
        return None
    towers = {modality: SampleFlops(dict(counted)) for modality, counted in told.items()}
    contrast = {name: _contrast(run, name) for name in run.pair_kinds}
    return StepWork(towers, contrast, mesh.world, mesh.world // data_ranks)


def _computed(run: Run, model: Encoders) -> list[Modality]:
    """Towers that run for every sample."""
    cached = {modality for modality, tower in run.towers.items() if isinstance(tower, TextTower) and tower.cached_rows}
    return [modality for modality in model.modalities if modality not in cached]


def _tower(run: Run, model: Encoders, modality: Modality) -> SampleFlops:
    """A tower with its projection, which trains always, and needs its input's gradient where the tower trains."""
    tower = model.tower(modality)
    projection = 2 * tower.embed_dim * run.embed_dim * (2 if tower.locked == "wholly" else 3)
    return SampleFlops({length: flops + projection for length, flops in count_sample(modality, tower).counted.items()})


def _contrast(run: Run, name: str) -> int:
    kind = run.pair_kinds[name]
    return cost_of(kind.objective, _ALL_KEPT, kind.global_batch, run.embed_dim, world=1, ranks_per_node=None, dtype=torch.float32).flops
