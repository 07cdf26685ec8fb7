"""What the batches of all ranks held: how much of them was padding, and which samples could not be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from clipscale.data.bad_samples import BadSampleBudget
from clipscale.data.sample import BadSample, Batch
from clipscale.parallel.mesh import Mesh


class Tally:
    """One account on all ranks, the same on each, so that all stop together when too many samples are bad."""

    def __init__(self, mesh: Mesh, budget: BadSampleBudget) -> None:
        self.mesh, self.budget = mesh, budget
        self.padding: dict[str, dict[str, float]] = {}
        """Share of the last batches that was padding, by pair kind and modality."""
        self.finished: dict[str, list[dict[str, list[int]]]] = {}
        """Shards of un-indexed sources that some rank finished with the last batches, by pair kind."""

    def count(self, batches: Mapping[str, Batch], *, tell: Callable[[str, Sequence[BadSample]], None]) -> None:
        """Count the batches of one step; `tell` is called with the pair kind and the bad samples of all ranks, where there are any.

        Raises:
            ShardError: too many samples could not be read.
        """
        filled = [count for batch in batches.values() for counts in batch.filled.values() for count in counts]
        events = [sum(map(len, of)) for of in ([batch.bad for batch in batches.values()], [batch.finished for batch in batches.values()])]
        local = torch.tensor([*events, *filled], dtype=torch.float64, device=self.mesh.device)
        any_bad, any_finished, *sums = self.mesh.all_reduce_sum(local).tolist()
        self.finished = {name: self.mesh.gather_objects(batch.finished) for name, batch in batches.items() if any_finished}
        counted = iter(zip(sums[::2], sums[1::2], strict=True))
        for name, batch in batches.items():
            self.padding[name] = {
                modality: 1 - used / max(places, 1) for modality, (used, places) in zip(batch.filled, counted, strict=False)
            }
        for name, batch in batches.items():
            if not any_bad:
                self.budget.count([True] * (len(batch.keys) * self.mesh.world), [])
                continue
            parts = self.mesh.gather_objects([batch.valid.tolist(), [[bad.key, bad.source, bad.reason, bad.where] for bad in batch.bad]])
            bad = [BadSample(*fields) for _, rows in parts for fields in rows]
            tell(name, bad)
            self.budget.count([good for valid, _ in parts for good in valid], bad)
